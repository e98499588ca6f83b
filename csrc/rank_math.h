// What: the formulas of the ranking reward that CPU and CUDA share, on one score or one rank at a
//   time.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4, as numbered in elva_kernels.reference:
//   (2) rank   = place in the order: score descending, then negatives by index, then the positive
//   (3) R_margin = max(0, s_pos - max_i s_i - margin)
//   (4) R_rank   = s_pos / (1 + ln r) - rank_penalty * sum over negatives of s_(k) (ln k - 1)
//   (3g), (4g): both where a negative has a relevance in [0, 1]; 0 gives the same values as none
// Ties: an order on scores with all ties broken is an order on integers (rank_key), so that every
//   sort, count or network gives the same ranks. -0.0 equals 0.0; a score that is not finite is
//   below every finite one.
// Numerics: double throughout; deterministic.
// Reference: elva_kernels.reference.reward_from_scores.
#ifndef ELVA_RANK_MATH_H_
#define ELVA_RANK_MATH_H_

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define ELVA_HOST_DEVICE __host__ __device__
#else
#define ELVA_HOST_DEVICE
#endif

namespace elva {

// Integers in the order of the scores; 0 for a score that is not finite.
ELVA_HOST_DEVICE inline uint32_t ordered_bits(float score) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof(bits));
  if ((bits & 0x7f800000u) == 0x7f800000u) return 0;
  if (bits == 0x80000000u) bits = 0;
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

ELVA_HOST_DEVICE inline uint64_t ordered_bits(double score) {
  uint64_t bits;
  memcpy(&bits, &score, sizeof(bits));
  if ((bits & 0x7ff0000000000000u) == 0x7ff0000000000000u) return 0;
  if (bits == 0x8000000000000000u) bits = 0;
  return (bits & 0x8000000000000000u) ? ~bits : bits | 0x8000000000000000u;
}

template <class Value>
struct RankKey;
template <>
struct RankKey<float> {
  using Type = uint64_t;
};
template <>
struct RankKey<double> {
  using Type = unsigned __int128;
};

// Candidate `index` (0 is the positive, fewer than 2^32 - 1 in all) comes before another one where
// its key is greater. No two candidates of a group share a key.
template <class Value>
ELVA_HOST_DEVICE inline typename RankKey<Value>::Type rank_key(Value score, uint32_t index) {
  const uint32_t tie = index == 0 ? 0 : UINT32_MAX - index;
  return (static_cast<typename RankKey<Value>::Type>(ordered_bits(score)) << 32) | tie;
}

// d R_rank / d s: what a candidate's score is multiplied by in (4); log_rank = ln of its 1-based
// rank.
ELVA_HOST_DEVICE inline double rank_weight(bool is_positive, double log_rank, double rank_penalty) {
  return is_positive ? 1.0 / (1.0 + log_rank) : -rank_penalty * (log_rank - 1.0);
}

// The same of a negative with a relevance, in (4g).
ELVA_HOST_DEVICE inline double graded_rank_weight(double log_rank, double rank_penalty,
                                                  double relevance) {
  return relevance / (1.0 + log_rank) - rank_penalty * (1.0 - relevance) * (log_rank - 1.0);
}

// d rank_weight / d rank.
ELVA_HOST_DEVICE inline double rank_weight_slope(bool is_positive, double rank,
                                                 double rank_penalty) {
  const double contrast = 1.0 + log(rank);
  return (is_positive ? -1.0 / (contrast * contrast) : -rank_penalty) / rank;
}

// The same of a negative with a relevance: d graded_rank_weight / d rank.
ELVA_HOST_DEVICE inline double graded_rank_weight_slope(double rank, double rank_penalty,
                                                        double relevance) {
  const double contrast = 1.0 + log(rank);
  return (-relevance / (contrast * contrast) - rank_penalty * (1.0 - relevance)) / rank;
}

// Whether a relevance is one; NaN is none.
ELVA_HOST_DEVICE inline bool is_relevance(double relevance) {
  return relevance >= 0 && relevance <= 1;
}

// What the hardest negative in (3g) is the first maximum of, and margin_hinge's `hardest`. Never
// fused: every device rounds alike, and chooses the same one.
ELVA_HOST_DEVICE inline double graded_rival(double score, double margin, double relevance) {
#ifdef __CUDA_ARCH__
  return __dsub_rn(score, __dmul_rn(margin, relevance));
#else
  return score - margin * relevance;
#endif
}

// R_margin (3); its gradient is +1 on the positive and -1 on the hardest negative where this is
// above 0.
ELVA_HOST_DEVICE inline double margin_hinge(double positive, double hardest, double margin) {
  const double gap = positive - hardest - margin;
  return gap > 0 ? gap : 0.0;
}

}  // namespace elva
#endif  // ELVA_RANK_MATH_H_
