// Rows of a group as they lie in the caller's memory, and their dots and norms by half-warps: a warp
// sums two rows at a time, one in each half, or one in both.
//
// A row's sums are the same to the last bit whatever kernel, layout or scale it is read by: columns
// come in segments, each summed in float by 16 lanes of 4 chains and a tree; the segments are added
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

// Where a negative's row lies: among the group's own or in the bank, or one of these.
constexpr int64_t kMasked = -1;
constexpr int64_t kNowhere = -2;  // no row of the bank; never read, and not finite

// The candidates of a group, the positive first.
template <class T>
struct Candidates {
  const T *positive, *negatives;
  int64_t positive_stride, row_stride, stride;
  const void* marks;  // bool: the mask, or int64_t: rows of a bank; null: all live
  int64_t marks_stride, bank_rows;
  bool in_bank;

  __device__ Candidates(const ElvaRewardArgs& args, int64_t group)
      : positive(group_data<T>(args.batch, args.positive, group)),
        negatives(group_data<T>(args.batch, args.negative, group)),
        positive_stride(args.positive.stride),
        row_stride(args.negative.row_stride),
        stride(args.negative.stride),
        marks(nullptr),
        marks_stride(args.mask.stride),
        bank_rows(args.bank_rows),
        in_bank(args.index.data != nullptr) {
    if (in_bank) {
      marks = group_data<int64_t>(args.batch, args.index, group);
      marks_stride = args.index.stride;
    } else if (args.mask.data != nullptr) {
      marks = group_data<bool>(args.batch, args.mask, group);
    }
  }

  // Of candidate c; 0 for the positive.
  __device__ int64_t place(int64_t c) const {
    if (c == 0) return 0;
    const int64_t at = (c - 1) * marks_stride;
    if (in_bank) {
      const int64_t row = static_cast<const int64_t*>(marks)[at];
      return row == kMasked || (row >= 0 && row < bank_rows) ? row : kNowhere;
    }
    return marks == nullptr || static_cast<const bool*>(marks)[at] ? c - 1 : kMasked;
  }
  // Candidate c, which lies at `place`.
  __device__ Row<T> at(int64_t c, int64_t place) const {
    if (c == 0) return {positive, positive_stride, 0};
    return {negatives + place * row_stride, stride, 0};
  }
};

template <class T>
__device__ inline void widen_all(const Vector<T>& x, float* out) {
  if constexpr (is_bf16<T>) {  // two a word
    uint32_t words[4];
    memcpy(words, &x, sizeof(x));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair[2] = {words[i] << 16, words[i] & 0xffff0000u};
      memcpy(out + 2 * i, pair, sizeof(pair));
    }
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) out[i] = widen(x.at[i]);
  }
}

// A vector of a row into its lane's four chains.
template <class T>
__device__ inline void add_products(const float* x, const float* q, float* dots, float* squares) {
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) {
    dots[i % 4] = fmaf(x[i], q[i], dots[i % 4]);
    squares[i % 4] = fmaf(x[i], x[i], squares[i % 4]);
  }
}

constexpr int kRowLanes = 16;
__device__ inline int row_lane() { return static_cast<int>(threadIdx.x % kRowLanes); }

// Of a half-warp's values, on each of its lanes, by a tree.
__device__ inline float row_sum(float x) {
  for (int offset = kRowLanes / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}
__device__ inline float row_max(float x) {
  for (int offset = kRowLanes / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}
__device__ inline float sum_of_chains(const float* x) { return (x[0] + x[1]) + (x[2] + x[3]); }

// (row . query, row . row) over the columns [first, last) of one segment, on every lane.
template <class T>
__device__ inline float2 segment_sums(const Row<T>& row, const Row<T>& query, int64_t first,
                                      int64_t last, bool dense) {
  constexpr int kSize = Vector<T>::kSize;
  float dots[4] = {}, squares[4] = {};
  for (int64_t at = first + row_lane() * kSize; at < last; at += kRowLanes * kSize) {
    float x[kSize], q[kSize];
    row.read(at, last, dense, x);
    query.read(at, last, dense, q);
    add_products<T>(x, q, dots, squares);
  }
  return {row_sum(sum_of_chains(dots)), row_sum(sum_of_chains(squares))};
}

// The same of two rows a half-warp, of one segment, as they are, dense and in whole vectors: on a
// lane those of the first, or of the second where kOfSecond is set in its number. To the bit
// `segment_sums`. kSteps: `columns` is so many times what the lanes take at once; 0: it is any.
// `query(step, at, q)` gives the query's vector at `at`, where kSteps is above 0 in that step.
constexpr unsigned kOfSecond = 8;
template <class T, int kSteps, class Query>
__device__ inline float2 pair_sums(const T* one, const T* two, int columns, const Query& query) {
  constexpr int kSize = Vector<T>::kSize;
  float dots[2][4] = {}, squares[2][4] = {};
  const auto add = [&](int step, int at) {
    float x[kSize], q[kSize];
    const Vector<T> first = load16(one + at), second = load16(two + at);
    query(step, at, q);
    widen_all(first, x);
    add_products<T>(x, q, dots[0], squares[0]);
    widen_all(second, x);
    add_products<T>(x, q, dots[1], squares[1]);
  };
  if constexpr (kSteps > 0) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) add(step, (step * kRowLanes + row_lane()) * kSize);
  } else {
#pragma unroll 2
    for (int at = row_lane() * kSize; at < columns; at += kRowLanes * kSize) add(0, at);
  }
  // row_sum of four values, which are halved in number while the lanes are.
  const bool second = (threadIdx.x & kOfSecond) != 0, squared = (threadIdx.x & 4) != 0;
  const auto half = [](bool upper, float a, float b, int offset) {
    return (upper ? b : a) + __shfl_xor_sync(kAllLanes, upper ? a : b, offset);
  };
  const float dot = half(second, sum_of_chains(dots[0]), sum_of_chains(dots[1]), kOfSecond);
  const float square =
      half(second, sum_of_chains(squares[0]), sum_of_chains(squares[1]), kOfSecond);
  float sum = half(squared, dot, square, 4);
  for (int offset = 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  const float other = __shfl_xor_sync(kAllLanes, sum, 4);
  return squared ? float2{other, sum} : float2{sum, other};
}

// Of half a row of 768 elements in half precision, or a quarter of 1536, and so on: without branches.
constexpr int kWholeSteps = 3;

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

// `row_sums` of two dense rows of whole vectors, on a lane as `pair_sums`.
template <class T>
__device__ inline double2 pair_row_sums(const Row<T>& one, const Row<T>& two, const Row<T>& query,
                                        int64_t dim, int64_t columns) {
  double2 sum{0, 0};
  for (int64_t first = 0; first < dim; first += columns) {
    const int here = static_cast<int>(first + columns < dim ? columns : dim - first);
    const auto read = [&](int, int at, float* q) { widen_all(load16(query.data + first + at), q); };
    const float2 part =
        here == kWholeSteps * kRowLanes * Vector<T>::kSize
            ? pair_sums<T, kWholeSteps>(one.data + first, two.data + first, here, read)
            : pair_sums<T, 0>(one.data + first, two.data + first, here, read);
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
__device__ inline int row_exponent(const Row<T>& row, int64_t dim) {
  float largest = 0;
  for (int64_t i = row_lane(); i < dim; i += kRowLanes) {
    largest = fmaxf(largest, magnitude_of(row[i]));
  }
  return exponent_of(row_max(largest));
}
// 0 also where there is none.
__device__ inline int scale_of(int exponent) {
  return exponent == kZero || exponent == kNotFinite ? 0 : exponent;
}

// The row's square in units of 4^exponent, which is set; 0 for a zero row, NaN for one not finite.
// `square` of the row as it is. All lanes of the warp.
template <class T>
__device__ inline double scaled_square(Row<T>* row, double square, int64_t dim, int64_t columns) {
  const bool fine = is_in_range(square);
  if (__all_sync(kAllLanes, fine)) return square;
  const int exponent = row_exponent(*row, dim);
  const Row<T> scaled{row->data, row->stride, scale_of(exponent)};
  const double again = row_sums(scaled, scaled, dim, columns).y;
  if (fine) return square;
  row->exponent = scaled.exponent;
  return exponent == kNotFinite ? nan("") : exponent == kZero ? 0 : again;
}

// Its norm in those units.
template <class T>
__device__ inline double norm_of(Row<T>* row, double square, int64_t dim, int64_t columns) {
  return sqrt(scaled_square(row, square, dim, columns));
}

}  // namespace elva
#endif  // ELVA_CUDA_ROWS_H_
