// A matrix instruction on 16 rows, 8 columns and 32 bytes of terms: in half precision, sums in
// float; of 8-bit integers, sums in 32 bits.
#ifndef ELVA_CUDA_MULTIPLY_H_
#define ELVA_CUDA_MULTIPLY_H_

#include "device.h"

namespace elva {

// sum [16, 8] += the two words from `word` of every lane's vectors: lane l holds row l / 4 (and
// that plus 8) of the left, column l / 4 of the right, and of the sum those rows at columns
// 2 (l % 4) and the next. Which terms a lane's elements are is its own affair, as long as it is the
// same on the left and the right.
template <class T>
__device__ inline void multiply_add(float* sum, const Vector<T>& upper, const Vector<T>& lower,
                                    const Vector<T>& right, int word) {
  const uint32_t a[4] = {word_of(upper, word), word_of(lower, word), word_of(upper, word + 1),
                         word_of(lower, word + 1)};
  const uint32_t b[2] = {word_of(right, word), word_of(right, word + 1)};
#ifdef __CUDACC__
  if constexpr (is_bf16<T>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  host::multiply_add(sum, a, b, is_bf16<T>);
#endif
}

__device__ inline void multiply_add(int32_t* sum, const Vector<int8_t>& upper,
                                    const Vector<int8_t>& lower, const Vector<int8_t>& right,
                                    int word) {
  const uint32_t a[4] = {word_of(upper, word), word_of(lower, word), word_of(upper, word + 1),
                         word_of(lower, word + 1)};
  const uint32_t b[2] = {word_of(right, word), word_of(right, word + 1)};
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  host::multiply_add(sum, a, b);
#endif
}

}  // namespace elva
#endif  // ELVA_CUDA_MULTIPLY_H_
