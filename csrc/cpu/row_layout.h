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

// A group's negatives: in their place, or named in a bank.
template <class T>
struct NegativeRows {
  const T* data;
  int64_t row_stride;
  int64_t stride;
  const int64_t* index;  // null: in their place
  int64_t index_stride;
  int64_t bank_rows;

  // Whether negative i is none, by the index alone.
  bool is_hidden(int64_t i) const { return index != nullptr && index[i * index_stride] == -1; }

  // Null where the index names no row of the bank.
  const T* row(int64_t i) const {
    const int64_t at = index == nullptr ? i : index[i * index_stride];
    if (index != nullptr && (at < 0 || at >= bank_rows)) return nullptr;
    return data + at * row_stride;
  }
};

}  // namespace elva
#endif  // ELVA_CPU_ROW_LAYOUT_H_
