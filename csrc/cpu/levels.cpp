// The choice of the CPU level: every feature bit a level's code uses, and the operating system's
// promise (xgetbv, and Linux's permission for tiles) to save the registers it needs. On 64-bit Arm
// the operating system tells what the processor has.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <string>

#include "../elva.h"
#include "kernels.h"
#include "made_once.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
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

// Linux saves a process's tiles once it has asked for them.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

// The highest level that this CPU and its operating system have.
int best_level() {
  const Registers one = cpuid(1, 0);
  if (!bit(one.c, 27)) return ELVA_LEVEL_PLAIN;  // OSXSAVE: xgetbv exists
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool os_avx = (low & 0x6u) == 0x6u;       // xmm and ymm state
  const bool os_avx512 = (low & 0xe6u) == 0xe6u;  // and opmask, upper zmm, zmm 16-31
  const Registers seven = cpuid(7, 0);
  const bool avx = bit(one.c, 28), fma = bit(one.c, 12), f16c = bit(one.c, 29);
  if (!(os_avx && avx && fma && f16c && bit(seven.b, 5))) return ELVA_LEVEL_PLAIN;
  const bool f = bit(seven.b, 16), dq = bit(seven.b, 17), bw = bit(seven.b, 30),
             vl = bit(seven.b, 31);
  if (!(os_avx512 && f && dq && bw && vl)) return ELVA_LEVEL_AVX2;
  const bool bf16 = seven.a >= 1 && bit(cpuid(7, 1).a, 5), vnni = bit(seven.c, 11);
  if (!(bf16 && vnni)) return ELVA_LEVEL_AVX512;
  const bool os_tiles = (low & 0x60000u) == 0x60000u;
  const bool amx_tile = bit(seven.d, 24), amx_bf16 = bit(seven.d, 22);
  return os_tiles && amx_tile && amx_bf16 && may_use_tiles() ? ELVA_LEVEL_AMX
                                                             : ELVA_LEVEL_AVX512BF16;
}
#elif defined(__aarch64__)
// FEAT_DotProd: products of four 8-bit integers to a sum.
bool has_dot_products() {
#if defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotProducts) != 0;
#elif defined(__APPLE__)
  int there = 0;
  size_t size = sizeof(there);
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &there, &size, nullptr, 0) == 0 && there != 0;
#else
  return false;
#endif
}

int best_level() { return has_dot_products() ? ELVA_LEVEL_NEONDOT : ELVA_LEVEL_NEON; }
#else
int best_level() { return ELVA_LEVEL_PLAIN; }
#endif

// In the order of their numbers: the last one that is here is the best.
struct Entry {
  int number;
  const char* name;
  const Kernels* kernels;
};
#define ELVA_LEVEL_ENTRY(number, name) {number, name, &Level<number>::kernels},
constexpr Entry kLevels[] = {ELVA_EACH_LEVEL(ELVA_LEVEL_ENTRY)};
#undef ELVA_LEVEL_ENTRY

struct Choice {
  std::string levels;  // best first
  Entry chosen = {ELVA_LEVEL_PLAIN, nullptr, nullptr};
  std::string error;
};

Choice choose() {
  Choice choice;
  const char* forced = std::getenv("ELVA_KERNELS_CPU_LEVEL");
  const bool free = forced == nullptr || *forced == '\0';
  const int best = best_level();
  for (size_t i = std::size(kLevels); i-- > 0;) {
    const Entry& entry = kLevels[i];
    if (entry.number > best) continue;
    choice.levels += (choice.levels.empty() ? "" : " ") + std::string(entry.name);
    if (choice.chosen.kernels == nullptr && (free || std::strcmp(forced, entry.name) == 0))
      choice.chosen = entry;
  }
  if (choice.chosen.kernels == nullptr) {
    choice.error = "ELVA_KERNELS_CPU_LEVEL must be one of the levels of this CPU (" +
                   choice.levels + "), got '" + forced + "'; unset it to use the best";
  }
  return choice;
}

std::atomic<const Choice*> current{nullptr};

// Never freed: a call may hold it at process exit.
const Choice& choice() {
  return *made_once(&current, [] { return new const Choice(choose()); });
}

}  // namespace

const Kernels* chosen_kernels() { return choice().chosen.kernels; }

}  // namespace elva

extern "C" {

const char* elva_cpu_level(void) { return elva::choice().chosen.name; }

const char* elva_cpu_level_error(void) { return elva::choice().error.c_str(); }

const char* elva_cpu_levels(void) { return elva::choice().levels.c_str(); }

void elva_cpu_level_reset(void) { elva::current.store(nullptr, std::memory_order_release); }

}  // extern "C"
