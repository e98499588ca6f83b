// The thread's own memory, and loops over pieces that work in it.
#ifndef ELVA_CPU_ARENA_H_
#define ELVA_CPU_ARENA_H_

#include <stddef.h>
#include <stdint.h>

#include <new>

#include "parallel.h"

namespace elva {

// 64-byte aligned memory of one thread, kept between calls up to kKept bytes. take() after reset()
// of enough.
class Arena {
 public:
  ~Arena() { release(); }

  // Throws std::bad_alloc.
  void reset(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    release();
    base_ = static_cast<char*>(::operator new(bytes, std::align_val_t(64)));
    size_ = bytes;
  }

  template <class T>
  T* take(int64_t count) {
    T* out = reinterpret_cast<T*>(base_ + used_);
    used_ += bytes_for<T>(count);
    return out;
  }

  template <class T>
  static size_t bytes_for(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }

  void trim() {
    if (size_ > kKept) release();
  }

 private:
  static constexpr size_t kKept = size_t{4} << 20;

  void release() {
    if (base_ != nullptr) ::operator delete(base_, std::align_val_t(64));
    base_ = nullptr;
    size_ = used_ = 0;
  }

  char* base_ = nullptr;
  size_t size_ = 0;
  size_t used_ = 0;
};

inline Arena& thread_arena() {
  static thread_local Arena arena;
  return arena;
}

// for_pieces, whose body(begin, end, arena) may take `bytes` of its thread's arena.
template <class Body>
ElvaStatus for_pieces(int64_t items, int64_t grain, int threads, size_t bytes, const Body& body) {
  return for_pieces(items, grain, threads, [&](int64_t begin, int64_t end) {
    Arena& arena = thread_arena();
    arena.reset(bytes);
    body(begin, end, &arena);
    arena.trim();
  });
}

}  // namespace elva
#endif  // ELVA_CPU_ARENA_H_
