// Ranks, rewards and their slopes from one group's scores: rank (2), margin reward (3), rank reward
// (4), reward (5), soft rank (6) of elva_kernels.reference.
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
           Arena::bytes_for<double>(count) * 2 + Arena::bytes_for<V>(count);
  }
  RankBuffers(int64_t count, Arena* arena)
      : keys(arena->take<Key>(count)),
        ranks(arena->take<int32_t>(count)),
        soft_ranks(arena->take<double>(count)),
        slopes(arena->take<double>(count)),
        rank_slopes(arena->take<V>(count)) {}

  Key* keys;
  int32_t* ranks;
  double* soft_ranks;
  double* slopes;  // d reward / d score; with soft ranks not before add_soft_slopes
  V* rank_slopes;
};

// Eq. (2) to (6). A score that is not finite makes all rewards and slopes NaN.
template <class V>
GroupReward reward_of(const Kernels& kernels, const V* scores, int64_t count,
                      const ElvaRewardWeights& weights, const RankBuffers<V>& buffers) {
  const int32_t* ranks = buffers.ranks;
  double* slopes = buffers.slopes;
  rank_candidates<V>(kernels, scores, count, buffers.keys, buffers.ranks);
  if (!std::all_of(scores, scores + count, [](V score) { return std::isfinite(score); })) {
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
    const double weight = rank_weight(i == 0, log_rank, weights.rank_penalty);
    out.rank_reward += weight * static_cast<double>(scores[i]);
    slopes[i] = weights.w_rank * weight;
    if (ranks[i] == hardest_rank) hardest = i;
  }
  if (count > 1) out.margin_reward = margin_hinge(scores[0], scores[hardest], weights.margin);
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
                     const ElvaRewardWeights& weights, const RankBuffers<V>& buffers) {
  double* soft_ranks = buffers.soft_ranks;
  if (weights.rank_temperature <= 0 || std::isnan(buffers.slopes[0])) return;
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    soft_ranks[i] = static_cast<double>(scores[i]) *
                    rank_weight_slope(i == 0, soft_ranks[i], weights.rank_penalty);
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
