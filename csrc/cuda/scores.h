// Scores of products of rows as elva_in_batch_cuda.h keeps them, and what blocks sum over them.
#ifndef ELVA_CUDA_SCORES_H_
#define ELVA_CUDA_SCORES_H_

#include "device.h"

namespace elva {

constexpr int kFour = Vector<float>::kSize;

// The largest float that is not above a limit: a float is above neither or both.
__device__ inline float limit_of(double max_score) {
  const float near = static_cast<float>(max_score);
  return static_cast<double>(near) > max_score ? nextafterf(near, -INFINITY) : near;
}

// 1 / T; NaN where it is not above 0.
__device__ inline double inverse_of(const double* temperature) {
  return *temperature > 0 ? 1 / *temperature : nan("");
}

// Not finite where the product is not, or a row.
__device__ inline float cosine_of(float product, float query, float candidate) {
  return product * query * candidate;
}

// In [-1, 1], and 0 where products may have underflowed; never -0.
__device__ inline float clamped(float cosine) {
  return fabsf(cosine) < 0x1p-50f ? 0.0f : fminf(1.0f, fmaxf(-1.0f, cosine));
}

// -inf where the cosine is no finite negative's.
__device__ inline float masked_score(float cosine, float limit) {
  const float score = clamped(cosine);
  return fabsf(cosine) < INFINITY && score <= limit ? score : -INFINITY;
}

// Of masked scores: exp((s - peak) / T), and that times (s - peak).
struct ScoreSums {
  float peak = -INFINITY;
  double sum = 0, moment = 0;

  // So that the peak is `to` or more.
  __device__ void raise(float to, float inverse_temperature) {
    if (!(to > peak)) return;
    if (peak > -INFINITY) {
      const float grown = peak - to;
      const double shrink = expf(grown * inverse_temperature);
      moment = (moment + sum * grown) * shrink;
      sum *= shrink;
    }
    peak = to;
  }

  // Scores of which `highest` is the highest.
  template <int kCount>
  __device__ void add(const float* scores, float highest, float inverse_temperature) {
    raise(highest, inverse_temperature);
    if (peak == -INFINITY) return;
    float terms = 0, moments = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float gap = scores[i] - peak, term = expf(gap * inverse_temperature);
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
