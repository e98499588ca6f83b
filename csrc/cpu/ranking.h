// Ranks, rewards and their slopes from one group's scores: rank (2), margin reward (3), rank reward
// (4), reward (5), soft rank (6), and both rewards with a relevance (3g, 4g), of
// elva_kernels.reference.
#ifndef ELVA_CPU_RANKING_H_
#define ELVA_CPU_RANKING_H_

#include <math.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <type_traits>

#include "../elva.h"
#include "../rank_math.h"
#include "arena.h"
#include "kernels.h"
#include "row_layout.h"

namespace elva {

// ln of a rank; the first ones from a table, since a logarithm costs more than the rest of a
// candidate's ranking.
inline double log_of_rank(int64_t rank) {
  struct Table {
    double logs[4096];
    Table() {
      logs[0] = 0;
      for (int k = 1; k < 4096; ++k) logs[k] = std::log(static_cast<double>(k));
    }
  };
  static const Table table;
  return rank < 4096 ? table.logs[rank] : std::log(static_cast<double>(rank));
}

// Compare-and-count beats a sort up to about this many candidates (measured: 0.5 against 2.5 us at
// 101).
constexpr int64_t kCountLimit = 512;

// ranks[i] of scores[i] within the group; place 0 is the positive.
template <class V>
void rank_candidates(const Kernels& kernels, const V* scores, int64_t count,
                     typename RankKey<V>::Type* keys, int32_t* ranks) {
  for (int64_t i = 0; i < count; ++i) keys[i] = rank_key(scores[i], static_cast<uint32_t>(i));
  if constexpr (std::is_same_v<V, float>) {
    if (count <= kCountLimit) return kernels.count_ranks(keys, count, ranks);
  }
  std::sort(keys, keys + count, std::greater<typename RankKey<V>::Type>());
  for (int64_t place = 0; place < count; ++place) {
    const uint32_t tie = static_cast<uint32_t>(keys[place]);
    ranks[tie == 0 ? 0 : UINT32_MAX - tie] = static_cast<int32_t>(place + 1);
  }
}

struct GroupReward {
  double reward, margin_reward, rank_reward;
  int32_t rank;
};

// What a group's ranking needs beside the scores of its live candidates, the positive first.
template <class V>
struct RankBuffers {
  using Key = typename RankKey<V>::Type;

  static size_t arena_bytes(int64_t count) {
    return Arena::bytes_for<Key>(count) + Arena::bytes_for<int32_t>(count) +
           Arena::bytes_for<double>(count) * 2 + Arena::bytes_for<V>(count) * 2;
  }
  RankBuffers(int64_t count, Arena* arena)
      : keys(arena->take<Key>(count)),
        ranks(arena->take<int32_t>(count)),
        soft_ranks(arena->take<double>(count)),
        slopes(arena->take<double>(count)),
        rank_slopes(arena->take<V>(count)),
        relevance(arena->take<V>(count)) {}

  Key* keys;
  int32_t* ranks;
  double* soft_ranks;
  double* slopes;  // d reward / d score; with soft ranks not before add_soft_slopes
  V* rank_slopes;
  V* relevance;  // of the live candidates; the positive's is not read
};

// The relevance of the live candidates, in `buffers`, out of a group's negatives'; null for null.
template <class V>
const V* live_relevance(const V* negatives, const uint32_t* live, int64_t count,
                        const RankBuffers<V>& buffers) {
  if (negatives == nullptr) return nullptr;
  for (int64_t j = 1; j < count; ++j) buffers.relevance[j] = negatives[live[j] - 1];
  return buffers.relevance;
}

// (3) or, of rivals that a relevance makes, (3g): the hardest negative and its score there.
struct Hardest {
  int64_t candidate;
  double score;
};

template <class V>
Hardest hardest_rival(const V* scores, int64_t count, double margin, const V* relevance) {
  Hardest first{0, -std::numeric_limits<double>::infinity()};
  for (int64_t i = 1; i < count; ++i) {
    const double rival =
        graded_rival(static_cast<double>(scores[i]), margin, static_cast<double>(relevance[i]));
    if (first.candidate == 0 || rival > first.score) first = {i, rival};
  }
  return first;
}

// Eq. (2) to (6), with a relevance of the live candidates (3g) and (4g) in place of (3) and (4). A
// score that is not finite, or a relevance that is none, makes all rewards and slopes NaN.
template <class V>
GroupReward reward_of(const Kernels& kernels, const V* scores, int64_t count,
                      const ElvaRewardWeights& weights, const V* relevance,
                      const RankBuffers<V>& buffers) {
  const int32_t* ranks = buffers.ranks;
  double* slopes = buffers.slopes;
  rank_candidates<V>(kernels, scores, count, buffers.keys, buffers.ranks);
  const bool graded = relevance != nullptr && count > 1;
  if (!std::all_of(scores, scores + count, [](V score) { return std::isfinite(score); }) ||
      (graded && !std::all_of(relevance + 1, relevance + count, is_relevance))) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    std::fill(slopes, slopes + count, nan);
    return {nan, nan, nan, ranks[0]};
  }
  const bool soft = weights.rank_temperature > 0;
  if (soft) {
    kernels.soft_ranks[std::is_same_v<V, double>](
        {scores, count, weights.rank_temperature, nullptr, buffers.soft_ranks});
  }
  GroupReward out{0, 0, 0, ranks[0]};
  int64_t hardest = 0;  // the first negative in the order
  const int32_t hardest_rank = ranks[0] == 1 ? 2 : 1;
  for (int64_t i = 0; i < count; ++i) {
    const double log_rank = soft ? std::log(buffers.soft_ranks[i]) : log_of_rank(ranks[i]);
    const double weight = graded && i > 0 ? graded_rank_weight(log_rank, weights.rank_penalty,
                                                               static_cast<double>(relevance[i]))
                                          : rank_weight(i == 0, log_rank, weights.rank_penalty);
    out.rank_reward += weight * static_cast<double>(scores[i]);
    slopes[i] = weights.w_rank * weight;
    if (ranks[i] == hardest_rank) hardest = i;
  }
  if (graded) {
    const Hardest rival = hardest_rival(scores, count, weights.margin, relevance);
    hardest = rival.candidate;
    out.margin_reward = margin_hinge(scores[0], rival.score, weights.margin);
  } else if (count > 1) {
    out.margin_reward = margin_hinge(scores[0], scores[hardest], weights.margin);
  }
  if (out.margin_reward > 0) {
    slopes[0] += weights.w_margin;
    slopes[hardest] -= weights.w_margin;
  }
  out.reward = weights.w_margin * out.margin_reward + weights.w_rank * out.rank_reward;
  return out;
}

// Adds to the slopes what reaches the scores through soft ranks: the sum over i of
// d reward / d rank_i * d rank_i / d score_k, with d rank_i / d score_k = sigma_ik (1 - sigma_ik) /
// temperature for k != i, and minus the sum of these for k = i. After reward_of.
template <class V>
void add_soft_slopes(const Kernels& kernels, const V* scores, int64_t count,
                     const ElvaRewardWeights& weights, const V* relevance,
                     const RankBuffers<V>& buffers) {
  double* soft_ranks = buffers.soft_ranks;
  if (weights.rank_temperature <= 0 || std::isnan(buffers.slopes[0])) return;
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double slope = relevance != nullptr && i > 0
                             ? graded_rank_weight_slope(soft_ranks[i], weights.rank_penalty,
                                                        static_cast<double>(relevance[i]))
                             : rank_weight_slope(i == 0, soft_ranks[i], weights.rank_penalty);
    soft_ranks[i] = static_cast<double>(scores[i]) * slope;
    largest = std::max(largest, std::fabs(soft_ranks[i]));
  }
  if (largest == 0) return;
  // In units of the largest: they fit V whatever the scores are.
  for (int64_t i = 0; i < count; ++i)
    buffers.rank_slopes[i] = static_cast<V>(soft_ranks[i] / largest);
  kernels.soft_slopes[std::is_same_v<V, double>](
      {scores, count, weights.rank_temperature, buffers.rank_slopes, soft_ranks});
  const double unit = weights.w_rank * largest / weights.rank_temperature;
  for (int64_t i = 0; i < count; ++i) buffers.slopes[i] += unit * soft_ranks[i];
}

}  // namespace elva
#endif  // ELVA_CPU_RANKING_H_
