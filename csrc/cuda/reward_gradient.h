// The gradients of a group from its coefficients (reward_group.h): some columns on a block of 256
// threads, 64 vectors wide; rows in 4 classes, candidate c in class c mod 4. The same to the last
// bit whichever kernel runs it.
#ifndef ELVA_CUDA_REWARD_GRADIENT_H_
#define ELVA_CUDA_REWARD_GRADIENT_H_

#include "rows.h"

namespace elva {

constexpr int kWide = 64, kClasses = 4, kGradientThreads = kWide * kClasses;

// Floats of shared memory that the sums of a block take.
template <class T>
constexpr int kGradientSums = kGradientThreads * Vector<T>::kSize;

// Products of floats with it are in range.
__device__ inline bool is_moderate(double x) {
  const double magnitude = fabs(x);
  return magnitude == 0 || (magnitude >= 0x1p-100 && magnitude <= 0x1p100);
}

// For the thread's vector of columns: read(c, x) gives those of candidate c, write(c, gradient)
// takes its gradient (c = -1: the query's). `works` where the thread has such a vector; `sums` is
// shared memory. All threads of the block.
template <class T, class Read, class Write>
__device__ inline void gradient_columns(int64_t candidates, const double* a, const double* b,
                                        double query_b, double upstream, bool works, float* sums,
                                        const Read& read, const Write& write) {
  constexpr int kSize = Vector<T>::kSize;
  const int own = static_cast<int>(threadIdx.x), at = own % kWide, row_class = own / kWide;
  float q[kSize], sum[kSize] = {};
  if (works) {
    float chain[kSize] = {};
    int terms = 0;
    read(-1, q);
    for (int64_t c = row_class; c < candidates; c += kClasses) {
      const double by_query = upstream * a[c], by_row = upstream * b[c];
      float x[kSize];
      if (a[c] == 0 && b[c] == 0) {  // masked, or a zero row
#pragma unroll
        for (int i = 0; i < kSize; ++i) x[i] = 0;
        write(c, x);
        continue;
      }
      read(c, x);
      if (is_moderate(by_query) && is_moderate(by_row)) {
        const float fast_query = static_cast<float>(by_query),
                    fast_row = static_cast<float>(by_row);
        float gradient[kSize];
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          gradient[i] = fmaf(fast_query, q[i], fast_row * x[i]);
          chain[i] = fmaf(fast_query, x[i], chain[i]);
        }
        write(c, gradient);
      } else {
        double gradient[kSize];
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          gradient[i] = by_query * q[i] + by_row * x[i];
          chain[i] += static_cast<float>(by_query * x[i]);
        }
        write(c, gradient);
      }
      if (++terms == 16) {
        terms = 0;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          sum[i] += chain[i];
          chain[i] = 0;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) sums[own * kSize + i] = sum[i] + chain[i];
  }
  __syncthreads();
  if (works && row_class == 0) {
    double gradient[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      gradient[i] = upstream * query_b * q[i];
      for (int r = 0; r < kClasses; ++r) gradient[i] += sums[(r * kWide + at) * kSize + i];
    }
    write(-1, gradient);
  }
  __syncthreads();
}

template <class T, class V>
__device__ inline Vector<T> packed(const V* x) {
  Vector<T> out;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) narrow(x[i], out.at + i);
  return out;
}

__device__ inline double upstream_of(const ElvaRewardArgs& args, int64_t group) {
  if (args.upstream.data == nullptr) return 1;
  return *group_data<float>(args.batch, args.upstream, group);
}

}  // namespace elva
#endif  // ELVA_CUDA_REWARD_GRADIENT_H_
