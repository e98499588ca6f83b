// Rows of a group as they lie in the caller's memory, and their dots and norms by a warp.
//
// A row's sums are the same to the last bit whatever kernel, layout or scale it is read by: columns
// come in segments, each summed in float by 32 lanes of 4 chains and a tree; the segments are added
// in double, in order. A segment is what a block of a cluster holds (split_of).
#ifndef ELVA_CUDA_ROWS_H_
#define ELVA_CUDA_ROWS_H_

#include "reward_group.h"

namespace elva {

// A row, read as value * 2^-exponent.
template <class T>
struct Row {
  static constexpr int kSize = Vector<T>::kSize;
  const T* data;
  int64_t stride;
  int exponent;

  __device__ float operator[](int64_t i) const {
    const float x = widen(data[i * stride]);
    return exponent == 0 ? x : scalbnf(x, -exponent);
  }
  // Whether vectors of it may be read.
  __device__ bool is_dense() const {
    return stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
  // The elements themselves, as `read`.
  __device__ Vector<T> packed(int64_t at, int64_t dim, bool dense) const {
    Vector<T> out;
    if (dense && at + kSize <= dim) {
      out = load16(data + at);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) out.at[i] = at + i < dim ? data[(at + i) * stride] : T{};
    }
    return out;
  }
  // kSize elements from `at`, a multiple of kSize; zeros beyond `dim`.
  __device__ void read(int64_t at, int64_t dim, bool dense, float* out) const {
    if (dense && at + kSize <= dim) {
      const Vector<T> x = load16(data + at);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        out[i] = widen(x.at[i]);
        if (exponent != 0) out[i] = scalbnf(out[i], -exponent);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) out[i] = at + i < dim ? (*this)[at + i] : 0.0f;
    }
  }
};

template <class T>
__device__ inline Row<T> candidate_row(const ElvaRewardArgs& args, int64_t group,
                                       int64_t candidate) {
  if (candidate == 0) {
    return {group_data<T>(args.batch, args.positive, group), args.positive.stride, 0};
  }
  const T* negatives = group_data<T>(args.batch, args.negative, group);
  return {negatives + (candidate - 1) * args.negative.row_stride, args.negative.stride, 0};
}

__device__ inline bool is_live(const ElvaRewardArgs& args, const bool* mask, int64_t candidate) {
  return candidate == 0 || mask == nullptr || mask[(candidate - 1) * args.mask.stride];
}

// (row . query, row . row) over the columns [first, last) of one segment, on every lane.
template <class T>
__device__ inline float2 segment_sums(const Row<T>& row, const Row<T>& query, int64_t first,
                                      int64_t last, bool dense) {
  constexpr int kSize = Vector<T>::kSize;
  float dots[4] = {}, squares[4] = {};
  for (int64_t at = first + static_cast<int64_t>(threadIdx.x % 32) * kSize; at < last;
       at += 32 * kSize) {
    float x[kSize], q[kSize];
    row.read(at, last, dense, x);
    query.read(at, last, dense, q);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      dots[i % 4] = fmaf(x[i], q[i], dots[i % 4]);
      squares[i % 4] = fmaf(x[i], x[i], squares[i % 4]);
    }
  }
  return {warp_sum((dots[0] + dots[1]) + (dots[2] + dots[3])),
          warp_sum((squares[0] + squares[1]) + (squares[2] + squares[3]))};
}

// The same of a whole row, in segments of `columns`.
template <class T>
__device__ inline double2 row_sums(const Row<T>& row, const Row<T>& query, int64_t dim,
                                   int64_t columns) {
  const bool dense = row.is_dense() && query.is_dense();
  double2 sum{0, 0};
  for (int64_t first = 0; first < dim; first += columns) {
    const int64_t last = first + columns < dim ? first + columns : dim;
    const float2 part = segment_sums(row, query, first, last, dense);
    sum.x += part.x;
    sum.y += part.y;
  }
  return sum;
}

// The exponent of a row's largest magnitude, or that it has none.
constexpr int kNotFinite = 1 << 20, kZero = -(1 << 20);
__device__ inline int exponent_of(float largest) {
  return isfinite(largest) ? largest > 0 ? ilogbf(largest) : kZero : kNotFinite;
}
// A magnitude for the largest: NaN is beyond all.
__device__ inline float magnitude_of(float x) { return isnan(x) ? INFINITY : fabsf(x); }

template <class T>
__device__ inline int warp_exponent(const Row<T>& row, int64_t dim) {
  float largest = 0;
  for (int64_t i = threadIdx.x % 32; i < dim; i += 32) {
    largest = fmaxf(largest, magnitude_of(row[i]));
  }
  return exponent_of(warp_max(largest));
}
// 0 also where there is none.
__device__ inline int scale_of(int exponent) {
  return exponent == kZero || exponent == kNotFinite ? 0 : exponent;
}

// The row's norm in units of 2^exponent, which is set; 0 for a zero row, NaN for one not finite.
// `square` of the row as it is.
template <class T>
__device__ inline double norm_of(Row<T>* row, double square, int64_t dim, int64_t columns) {
  if (is_in_range(square)) return sqrt(square);
  const int exponent = warp_exponent(*row, dim);
  if (exponent == kNotFinite) return nan("");
  if (exponent == kZero) return 0;
  row->exponent = exponent;
  return sqrt(row_sums(*row, *row, dim, columns).y);
}

}  // namespace elva
#endif  // ELVA_CUDA_ROWS_H_
