// What: the gradient of a bank of rows that groups of the grouped ranking reward name by index.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; cosine (1), rank (2), margin reward (3),
//   rank reward (4), reward (5), soft rank (6) of elva_kernels.reference.
// In: query [*, D], bank [M, D] in bf16, fp16 or fp32, any strides and any alignment (dense rows on
//   16 bytes are read in vectors); coefficients (reward_group.h) of a forward with index; upstream
//   [*]; order [L], the places in index sorted by the row that they name, and first [M + 1].
// Out: gradient [M, D], dense.
// Work split: a warp 32 vectors of a row of the bank; its lanes find a place each, then all of them
//   add the query of one after the other, kAhead read at once.
// Bytes: each row of the bank that is named read once and each gradient written once; beside that a
//   query a place, of which most are in the second-level cache, and its two coefficients.
// Numerics: kAhead terms of a query in float where its coefficient is in range, added in double;
//   coefficients in true units, whatever the rows' scales; rounded once. No atomics: the same bits on
//   every run.
// Limits: a row that many groups name takes as long as its places one after the other.
// Reference: elva_kernels.reference.ranking_reward_and_grad.
#include "reward_gradient.h"

namespace elva {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kAhead = 4;

// Vectors of 32 lanes to a row.
template <class T>
__host__ __device__ int64_t pieces_of(int64_t dim) {
  constexpr int64_t kColumns = 32 * Vector<T>::kSize;
  return (dim + kColumns - 1) / kColumns;
}

// What a place in index contributes: by_query of its group's query, and by_row of the row itself.
template <class T>
struct Term {
  const T* query = nullptr;
  double by_query = 0, by_row = 0;

  __device__ Term() {}
  __device__ Term(const ElvaBankGradientArgs& args, int64_t place) {
    const int64_t group = place / args.negatives, c = place % args.negatives + 1;
    const int64_t candidates = args.negatives + 1;
    const double* const a = args.coefficients + group * (2 * candidates + 1);
    const double* const b = a + candidates;
    query = group_data<T>(args.batch, args.query, group);
    if (a[c] == 0 && b[c] == 0) return;  // a zero row, or query
    const double upstream = upstream_of(args, group);
    by_query = upstream * a[c];
    by_row = upstream * b[c];
  }
};

// Adds the lane's vector of the queries of `count` terms, one a lane, from `at`.
template <class T>
__device__ inline void add_queries(const ElvaBankGradientArgs& args, const Term<T>& own, int count,
                                   int64_t at, double* sum) {
  constexpr int kSize = Vector<T>::kSize;
  for (int first = 0; first < count; first += kAhead) {
    Vector<T> queries[kAhead];
    double by[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int lane = first + j < count ? first + j : first;
      const auto address = __shfl_sync(kAllLanes, reinterpret_cast<uintptr_t>(own.query), lane);
      const Row<T> query{reinterpret_cast<const T*>(address), args.query.stride, 0};
      by[j] = __shfl_sync(kAllLanes, own.by_query, lane);
      if (first + j < count) queries[j] = query.packed(at, args.dim, query.is_dense());
    }
    float chain[kSize] = {};
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (first + j >= count) break;
      float q[kSize];
      widen_all(queries[j], q);
      const float narrow = static_cast<float>(by[j]);
      // A large query by the coefficient of a tiny row is beyond floats.
      float largest = 0;
#pragma unroll
      for (int k = 0; k < kSize; ++k) largest = fmaxf(largest, fabsf(q[k]));
      const bool fast = is_moderate(by[j]) && fabsf(narrow) * largest < 0x1p120f;
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (fast) chain[k] = fmaf(narrow, q[k], chain[k]);
        if (!fast) sum[k] += by[j] * q[k];
      }
    }
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum[k] += chain[k];
  }
}

template <class T>
__device__ inline void write(const ElvaBankGradientArgs& args, int64_t row, int64_t at,
                             const Vector<T>& x) {
  constexpr int kSize = Vector<T>::kSize;
  T* const out = static_cast<T*>(args.grad_negative) + row * args.dim;
  if (args.dim % kSize == 0 && reinterpret_cast<uintptr_t>(args.grad_negative) % 16 == 0) {
    if (at < args.dim) store16(out + at, x);
    return;
  }
#pragma unroll
  for (int k = 0; k < kSize; ++k)
    if (at + k < args.dim) out[at + k] = x.at[k];
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    reward_bank_gradient(const __grid_constant__ ElvaBankGradientArgs args) {
  constexpr int kSize = Vector<T>::kSize;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t pieces = pieces_of<T>(args.dim);
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t row = piece / pieces, at = (piece % pieces * 32 + lane) * kSize;
  if (row >= args.bank_rows) return;
  const int64_t last = args.first[row + 1];
  int64_t next = args.first[row];
  if (next == last) {
    write(args, row, at, Vector<T>{});
    return;
  }
  const Row<T> own{static_cast<const T*>(args.negative.data) + row * args.negative.row_stride,
                   args.negative.stride, 0};
  const Vector<T> packed_row = own.packed(at, args.dim, own.is_dense());
  double sum[kSize] = {}, by_row = 0;
  for (; next < last; next += 32) {
    const int count = static_cast<int>(last - next < 32 ? last - next : 32);
    const Term<T> term = lane < count ? Term<T>(args, args.order[next + lane]) : Term<T>();
    by_row += term.by_row;
    add_queries(args, term, count, at, sum);
  }
  by_row = warp_sum(by_row);
  float x[kSize];
  widen_all(packed_row, x);
#pragma unroll
  for (int k = 0; k < kSize; ++k) sum[k] += by_row * x[k];
  write(args, row, at, packed<T>(sum));
}

template <class T>
ElvaStatus launch_bank_gradient(const ElvaBankGradientArgs& args) {
  const int64_t pieces = args.bank_rows * pieces_of<T>(args.dim);
  return launch(reward_bank_gradient<T>, (pieces + kWarps - 1) / kWarps, 0, kThreads, 0,
                args.stream, args);
}

}  // namespace
}  // namespace elva

extern "C" ElvaStatus elva_bank_gradient_cuda(const ElvaBankGradientArgs* args) {
  return elva::on_device(args->dtype, args->device, [args](auto element) {
    return elva::launch_bank_gradient<decltype(element)>(*args);
  });
}
