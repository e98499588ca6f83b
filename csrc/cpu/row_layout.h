// Where a group's rows lie, and the thread's own memory.
#ifndef ELVA_CPU_ROW_LAYOUT_H_
#define ELVA_CPU_ROW_LAYOUT_H_

#include <stddef.h>
#include <stdint.h>

#include <new>

#include "../elva.h"

namespace elva {

// The coordinates of a group in the leading dimensions.
struct GroupIndex {
  int64_t at[ELVA_MAX_DIMS];

  GroupIndex(const ElvaBatch& batch, int64_t group) {
    for (int32_t i = batch.ndim - 1; i >= 0; --i) {
      at[i] = group % batch.sizes[i];
      group /= batch.sizes[i];
    }
  }
};

template <class T>
const T* group_data(const ElvaBatch& batch, const ElvaInput& input, const GroupIndex& index) {
  if (input.data == nullptr) return nullptr;
  int64_t offset = 0;
  for (int32_t i = 0; i < batch.ndim; ++i) offset += index.at[i] * input.batch_strides[i];
  return static_cast<const T*>(input.data) + offset;
}

// A row of `dim` elements in the caller's memory.
template <class T>
struct Row {
  const T* data;
  int64_t stride;

  const T& operator[](int64_t i) const { return data[i * stride]; }
};

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

}  // namespace elva
#endif  // ELVA_CPU_ROW_LAYOUT_H_
