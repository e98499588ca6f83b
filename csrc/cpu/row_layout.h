// Where a group's rows lie.
#ifndef ELVA_CPU_ROW_LAYOUT_H_
#define ELVA_CPU_ROW_LAYOUT_H_

#include <stdint.h>

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

}  // namespace elva
#endif  // ELVA_CPU_ROW_LAYOUT_H_
