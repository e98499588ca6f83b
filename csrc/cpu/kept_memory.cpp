// What: memory for large results, kept for the next one.
// Why: a page fresh from the system costs a fault and is cleared first, which takes longer than the
// ops that fill it (measured: 49 ms for 40 MB in 4 KB pages, 10 ms in 2 MB pages, the op 4), and a
// training loop asks for the same sizes at every step.
// Limits: at most ELVA_KERNELS_CACHE_MB (512) and 64 blocks lie idle; the oldest go first. After a
// fork while another thread held the lock, the child keeps nothing.
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <mutex>

#include "../elva.h"
#include "made_once.h"

namespace elva {
namespace {

constexpr int64_t kPage = int64_t{2} << 20;
constexpr int64_t kRounding = 64 << 10;
constexpr int64_t kMegabytes = 512;
constexpr int kMostBlocks = 64;

// Idle blocks, oldest first. Never destroyed: a result may outlive all but the process.
struct IdleBlocks {
  std::mutex mutex;
  ElvaBlock blocks[kMostBlocks];
  int count = 0;
  int64_t bytes = 0;

  ElvaBlock remove(int i) {
    const ElvaBlock block = blocks[i];
    memmove(blocks + i, blocks + i + 1, sizeof(ElvaBlock) * static_cast<size_t>(--count - i));
    bytes -= block.bytes;
    return block;
  }
};

std::atomic<IdleBlocks*> all_idle{nullptr};

IdleBlocks& idle_blocks() {
  return *made_once(&all_idle, [] { return new IdleBlocks; });
}

int64_t most_idle_bytes() {
  const char* wish = getenv("ELVA_KERNELS_CACHE_MB");
  const int64_t megabytes = wish == nullptr ? kMegabytes : strtoll(wish, nullptr, 10);
  return std::min<int64_t>(megabytes, int64_t{1} << 32) * (int64_t{1} << 20);
}

}  // namespace
}  // namespace elva

extern "C" {

ElvaStatus elva_acquire_block(int64_t bytes, ElvaBlock* block) {
  block->bytes = (bytes + elva::kRounding - 1) / elva::kRounding * elva::kRounding;
  elva::IdleBlocks& idle = elva::idle_blocks();
  if (idle.mutex.try_lock()) {
    int best = -1;
    for (int i = 0; i < idle.count; ++i) {
      const int64_t found = idle.blocks[i].bytes;
      const bool fits = found >= block->bytes && found <= block->bytes + block->bytes / 4;
      if (fits && (best < 0 || found <= idle.blocks[best].bytes)) best = i;
    }
    if (best >= 0) *block = idle.remove(best);
    idle.mutex.unlock();
    if (best >= 0) return ELVA_OK;
  }
  const size_t page = static_cast<size_t>(elva::kPage), size = static_cast<size_t>(block->bytes);
  if (posix_memalign(&block->data, page, size) != 0) return ELVA_OUT_OF_MEMORY;
#if defined(MADV_HUGEPAGE)
  madvise(block->data, size, MADV_HUGEPAGE);
#endif
  return ELVA_OK;
}

void elva_release_block(const ElvaBlock* block) {
  elva::IdleBlocks& idle = elva::idle_blocks();
  const int64_t most = elva::most_idle_bytes();
  if (!idle.mutex.try_lock()) return free(block->data);
  while (idle.count > 0 && (idle.bytes + block->bytes > most || idle.count == elva::kMostBlocks))
    free(idle.remove(0).data);
  const bool kept = block->bytes <= most;
  if (kept) {
    idle.blocks[idle.count++] = *block;
    idle.bytes += block->bytes;
  }
  idle.mutex.unlock();
  if (!kept) free(block->data);
}

}  // extern "C"
