// The choice of the CPU level: every feature bit a level's code uses, and the operating system's
// promise (xgetbv) to save the registers it needs.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#include "../elva.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace elva {
namespace {

#if defined(__x86_64__)
struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return Registers();
  return r;
}

bool bit(unsigned word, int position) { return (word >> position & 1u) != 0; }

struct Features {
  bool avx2 = false, avx512 = false, avx512bf16 = false;
};

Features detect() {
  Features found;
  const Registers one = cpuid(1, 0);
  if (!bit(one.c, 27)) return found;  // OSXSAVE: xgetbv exists
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool os_avx = (low & 0x6u) == 0x6u;       // xmm and ymm state
  const bool os_avx512 = (low & 0xe6u) == 0xe6u;  // and opmask, upper zmm, zmm 16-31
  const Registers seven = cpuid(7, 0);
  const bool avx = bit(one.c, 28), fma = bit(one.c, 12), f16c = bit(one.c, 29);
  found.avx2 = os_avx && avx && fma && f16c && bit(seven.b, 5);
  const bool f = bit(seven.b, 16), dq = bit(seven.b, 17), bw = bit(seven.b, 30),
             vl = bit(seven.b, 31);
  found.avx512 = found.avx2 && os_avx512 && f && dq && bw && vl;
  found.avx512bf16 = found.avx512 && seven.a >= 1 && bit(cpuid(7, 1).a, 5);
  return found;
}
#endif

struct Choice {
  const Kernels* supported[4] = {};  // best first, null-terminated where shorter
  int count = 0;
  std::string levels;
  const Kernels* chosen = nullptr;
  std::string error;
};

Choice choose() {
  Choice choice;
#if defined(__x86_64__)
  const Features found = detect();
  if (found.avx512bf16) choice.supported[choice.count++] = &kAvx512Bf16Kernels;
  if (found.avx512) choice.supported[choice.count++] = &kAvx512Kernels;
  if (found.avx2) choice.supported[choice.count++] = &kAvx2Kernels;
#endif
  choice.supported[choice.count++] = &kPlainKernels;
  for (int i = 0; i < choice.count; ++i) {
    if (i > 0) choice.levels += ' ';
    choice.levels += choice.supported[i]->name;
  }
  const char* forced = std::getenv("ELVA_KERNELS_CPU_LEVEL");
  if (forced == nullptr || *forced == '\0') {
    choice.chosen = choice.supported[0];
    return choice;
  }
  for (int i = 0; i < choice.count; ++i) {
    if (std::strcmp(forced, choice.supported[i]->name) == 0) choice.chosen = choice.supported[i];
  }
  if (choice.chosen == nullptr) {
    choice.error = "ELVA_KERNELS_CPU_LEVEL must be one of the levels of this CPU (" +
                   choice.levels + "), got '" + forced + "'; unset it to use the best";
  }
  return choice;
}

std::atomic<const Choice*> current{nullptr};
std::mutex choosing;

// Never freed: a call may hold it at process exit.
const Choice& choice() {
  const Choice* known = current.load(std::memory_order_acquire);
  if (known != nullptr) return *known;
  std::lock_guard<std::mutex> lock(choosing);
  known = current.load(std::memory_order_acquire);
  if (known == nullptr) {
    known = new Choice(choose());
    current.store(known, std::memory_order_release);
  }
  return *known;
}

}  // namespace

const Kernels* chosen_kernels() { return choice().chosen; }

}  // namespace elva

extern "C" {

const char* elva_cpu_level(void) {
  const elva::Kernels* chosen = elva::chosen_kernels();
  return chosen == nullptr ? nullptr : chosen->name;
}

const char* elva_cpu_level_error(void) { return elva::choice().error.c_str(); }

const char* elva_cpu_levels(void) { return elva::choice().levels.c_str(); }

void elva_cpu_level_reset(void) { elva::current.store(nullptr, std::memory_order_release); }

}  // extern "C"
