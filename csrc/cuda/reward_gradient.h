// The gradients of a group from its coefficients (reward_group.h): some columns on a block of 256
// threads, 64 vectors wide; rows in 4 classes, candidate c in class c mod 4. The same to the last
// bit whichever kernel runs it.
#ifndef ELVA_CUDA_REWARD_GRADIENT_H_
#define ELVA_CUDA_REWARD_GRADIENT_H_

#include "rows.h"

namespace elva {

constexpr int kWide = 64, kClasses = 4, kGradientThreads = kWide * kClasses;

// Shared memory that gradient_columns takes.
constexpr size_t kGradientShared = kGradientThreads * sizeof(float2);

// All rows dense and on 16 bytes, in and out.
template <class T>
bool has_whole_rows(const ElvaRewardArgs& args) {
  const auto whole = [](int64_t elements) { return elements % Vector<T>::kSize == 0; };
  const auto fits = [&](const ElvaInput& input, bool has_rows) {
    bool fine = input.stride == 1 && reinterpret_cast<uintptr_t>(input.data) % 16 == 0;
    for (int32_t i = 0; i < args.batch.ndim; ++i) fine = fine && whole(input.batch_strides[i]);
    return fine && (!has_rows || whole(input.row_stride));
  };
  const auto out = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const int64_t rows = args.index.data == nullptr ? args.negatives : args.bank_rows;
  return whole(args.dim) && fits(args.query, false) && fits(args.positive, false) &&
         (rows == 0 || fits(args.negative, rows > 1)) && out(args.grad_query) &&
         out(args.grad_positive) && out(args.grad_negative);
}

// Products of floats with it are in range.
__device__ inline bool is_moderate(double x) {
  const double magnitude = fabs(x);
  return magnitude == 0 || (magnitude >= 0x1p-100 && magnitude <= 0x1p100);
}

// A candidate's coefficients of the query and of its row as floats: both 0 where its gradient is,
// NaN where doubles are needed.
__device__ inline float2 fast_coefficients(double a, double b, double upstream) {
  if (a == 0 && b == 0) return {0, 0};  // masked, or a zero row
  const double by_query = upstream * a, by_row = upstream * b;
  // Zeros by `upstream` multiply their rows: NaN stays NaN.
  const bool fast = is_moderate(by_query) && is_moderate(by_row) && (by_query != 0 || by_row != 0);
  if (!fast) return {NAN, NAN};
  return {static_cast<float>(by_query), static_cast<float>(by_row)};
}

// Whose gradients the caller wants.
struct Wanted {
  bool query, positive, negatives;

  __host__ __device__ explicit Wanted(const ElvaRewardArgs& args)
      : query(args.grad_query != nullptr),
        positive(args.grad_positive != nullptr),
        negatives(args.grad_negative != nullptr) {}

  __host__ __device__ bool any() const { return query || positive || negatives; }
  // Candidate c's, or the query's (-1).
  __device__ bool of(int64_t c) const { return c < 0 ? query : c == 0 ? positive : negatives; }
  // How many candidates matter to them.
  __device__ int64_t count(int64_t candidates) const { return query || negatives ? candidates : 1; }
};

// For the thread's vector of columns: read(c) gives those of candidate c, write(c, gradient) takes
// its gradient, with kNegatives of every one, else of the positive alone, and at last that of the
// query (c = -1); kAhead rows are read at once. `works` where the thread has such a vector; `shared`
// is kGradientShared bytes. All threads of the block; a barrier before.
template <class T, int kAhead, bool kNegatives, class Read, class Write>
__device__ inline void gradient_columns(int64_t candidates, const double* a, const double* b,
                                        double query_b, double upstream, bool works,
                                        unsigned char* shared, const Read& read,
                                        const Write& write) {
  constexpr int kSize = Vector<T>::kSize;
  static_assert(kWide * kSize * sizeof(float) <= kGradientShared);
  const int own = static_cast<int>(threadIdx.x), at = own % kWide, row_class = own / kWide;
  float2* fast = reinterpret_cast<float2*>(shared);
  float q[kSize] = {}, sum[kSize] = {}, chain[kSize] = {};
  int terms = 0;
  if (works) widen_all(read(-1), q);
  const auto write_zeros = [&](int64_t c) {
    const float gradient[kSize] = {};
    write(c, gradient);
  };
  const auto write_fast = [&](int64_t c, float2 by, const float* x) {
    float gradient[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) gradient[k] = fmaf(by.x, q[k], by.y * x[k]);
    write(c, gradient);
  };
  const auto write_exact = [&](int64_t c, double by_query, double by_row, const float* x) {
    float own[kSize];  // q once more: as doubles it would wait in registers for all rows
    double gradient[kSize];
    widen_all(read(-1), own);
#pragma unroll
    for (int k = 0; k < kSize; ++k) gradient[k] = by_query * own[k] + by_row * x[k];
    write(c, gradient);
  };
  for (int64_t first = 0; first < candidates; first += kGradientThreads) {
    if (first > 0) __syncthreads();
    if (first + own < candidates) {
      fast[own] = fast_coefficients(a[first + own], b[first + own], upstream);
    }
    __syncthreads();
    const int count = static_cast<int>(candidates - first < kGradientThreads ? candidates - first
                                                                             : kGradientThreads);
    for (int next = works ? row_class : count; next < count; next += kAhead * kClasses) {
      Vector<T> rows[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int i = next + j * kClasses;
        if (i < count && (fast[i].x != 0 || fast[i].y != 0)) rows[j] = read(first + i);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int i = next + j * kClasses;
        if (i >= count) break;
        const int64_t c = first + i;
        const float2 by = fast[i];
        if (by.x == 0 && by.y == 0) {
          if (kNegatives) write_zeros(c);
          continue;
        }
        float x[kSize];
        widen_all(rows[j], x);
        if (!isnan(by.x)) {
          if (kNegatives) write_fast(c, by, x);
#pragma unroll
          for (int k = 0; k < kSize; ++k) chain[k] = fmaf(by.x, x[k], chain[k]);
        } else {
          const double by_query = upstream * a[c];
          if (kNegatives) write_exact(c, by_query, upstream * b[c], x);
#pragma unroll
          for (int k = 0; k < kSize; ++k) chain[k] += static_cast<float>(by_query * x[k]);
        }
        if (++terms == 16) {
          terms = 0;
#pragma unroll
          for (int k = 0; k < kSize; ++k) {
            sum[k] += chain[k];
            chain[k] = 0;
          }
        }
      }
    }
  }
  if (!kNegatives && works && row_class == 0) {  // the positive
    const float2 by = fast_coefficients(a[0], b[0], upstream);
    float x[kSize];
    widen_all(read(0), x);
    if (by.x == 0 && by.y == 0) {
      write_zeros(0);
    } else if (!isnan(by.x)) {
      write_fast(0, by, x);
    } else {
      write_exact(0, upstream * a[0], upstream * b[0], x);
    }
  }
  // Class by class into the first, in double.
  float* sums = reinterpret_cast<float*>(shared);
  double gradient[kSize];
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    gradient[k] = upstream * query_b * q[k] + (sum[k] + chain[k]);
  }
  for (int turn = 1; turn < kClasses; ++turn) {
    __syncthreads();
    if (works && row_class == turn) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) sums[k * kWide + at] = sum[k] + chain[k];
    }
    __syncthreads();
    if (row_class == 0) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) gradient[k] += sums[k * kWide + at];
    }
  }
  if (works && row_class == 0) write(-1, gradient);
  __syncthreads();
}

template <class T, class V>
__device__ inline Vector<T> packed(const V* x) {
  Vector<T> out;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) narrow(x[i], out.at + i);
  return out;
}

template <class Args>
__device__ inline double upstream_of(const Args& args, int64_t group) {
  if (args.upstream.data == nullptr) return 1;
  return *group_data<float>(args.batch, args.upstream, group);
}

}  // namespace elva
#endif  // ELVA_CUDA_REWARD_GRADIENT_H_
