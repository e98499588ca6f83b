// Scores of products of rows as elva_in_batch_cuda.h keeps them, and what blocks sum over them.
#ifndef ELVA_CUDA_SCORES_H_
#define ELVA_CUDA_SCORES_H_

#include "device.h"

namespace elva {

constexpr int kFour = Vector<float>::kSize;

// What a cosine is not above where its score, which is clamped, is not above a limit.
__device__ inline float limit_of(double max_score) {
  float limit = static_cast<float>(max_score);
  if (static_cast<double>(limit) > max_score) limit = nextafterf(limit, -INFINITY);
  return limit >= 1 ? INFINITY : limit < -1 ? -INFINITY : limit;
}

// 1 / T; NaN where it is not above 0.
__device__ inline double inverse_of(const double* temperature) {
  return *temperature > 0 ? 1 / *temperature : nan("");
}

// exp(gap / T) is 2^(gap scale): one instruction of a GPU, to 2^-22.
__device__ inline float scale_of_gaps(const double* temperature) {
  return static_cast<float>(1.4426950408889634 * inverse_of(temperature));
}
__device__ inline float power_of_two(float x) {
#ifdef __CUDACC__
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return exp2f(x);
#endif
}

// NaN where the product is, or a row is not finite.
__device__ inline float cosine_of(float product, float query, float candidate) {
  return product * query * candidate;
}

// In [-1, 1]; never -0.
__device__ inline float clamped(float cosine) { return fminf(1.0f, fmaxf(-1.0f, cosine)) + 0.0f; }

// -inf where the cosine is no negative's.
__device__ inline float masked_score(float cosine, float limit) {
  return cosine <= limit ? clamped(cosine) : -INFINITY;
}

// Of masked scores: exp((s - peak) / T), and that times (s - peak).
struct ScoreSums {
  float peak = -INFINITY;
  double sum = 0, moment = 0;

  // So that the peak is `to` or more.
  __device__ void raise(float to, float scale) {
    if (!(to > peak)) return;
    if (peak > -INFINITY) {
      const float grown = peak - to;
      const double shrink = power_of_two(grown * scale);
      moment = (moment + sum * grown) * shrink;
      sum *= shrink;
    }
    peak = to;
  }

  // Scores of which `highest` is the highest.
  template <int kCount>
  __device__ void add(const float* scores, float highest, float scale) {
    raise(highest, scale);
    if (peak == -INFINITY) return;
    float terms = 0, moments = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float gap = scores[i] - peak, term = power_of_two(gap * scale);
      terms += term;
      moments += term * fmaxf(gap, -4.0f);  // no gap is as large but those of -inf
    }
    sum += terms;
    moment += moments;
  }
};

inline int64_t blocks_of(int64_t items, int64_t each) { return (items + each - 1) / each; }

}  // namespace elva
#endif  // ELVA_CUDA_SCORES_H_
