// The guest of guest.h: csrc/cpu on its own, answering calls. Arguments: the arena's descriptor and
// that of the socket.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "float_mode.h"
#include "guest.h"

namespace {

template <class Args>
ElvaStatus run(ElvaStatus (*op)(const Args*), const Call& call) {
  if (call.bytes != static_cast<int32_t>(sizeof(Args))) abort();
  const elva::DefaultFloatMode mode;
  return op(reinterpret_cast<const Args*>(call.args));
}

void choose(Levels* levels) {
  setenv("ELVA_KERNELS_CPU_LEVEL", levels->forced, 1);
  elva_cpu_level_reset();
  const char* level = elva_cpu_level();
  snprintf(levels->level, sizeof(levels->level), "%s", level == nullptr ? "" : level);
  snprintf(levels->levels, sizeof(levels->levels), "%s", elva_cpu_levels());
  snprintf(levels->error, sizeof(levels->error), "%s", elva_cpu_level_error());
  levels->multiplies_bf16 = elva_multiplies_bf16();
}

ElvaStatus answer(const Call& call) {
  switch (call.op) {
#define ELVA_GUEST_CASE(op, Args) \
  case kOp_##op:                  \
    return run(elva_##op##_cpu, call);
    ELVA_GUEST_OPS(ELVA_GUEST_CASE)
    case kOp_level:
      choose(reinterpret_cast<Levels*>(call.args));
      return ELVA_OK;
  }
  abort();
}

}  // namespace

int main(int, char** arguments) {
  const int arena = std::atoi(arguments[1]), socket = std::atoi(arguments[2]);
  void* at = mmap(reinterpret_cast<void*>(kArena), kArenaBytes, PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_FIXED | MAP_NORESERVE, arena, 0);
  if (at != reinterpret_cast<void*>(kArena)) return 3;
  Call call;
  while (read(socket, &call, sizeof(call)) == sizeof(call)) {
    const ElvaStatus status = answer(call);
    if (write(socket, &status, sizeof(status)) != sizeof(status)) return 4;
  }
  return 0;
}
