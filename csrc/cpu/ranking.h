// Ranks, rewards and their slopes from one group's scores: eq. (2) to (5) of
// elva_kernels/reference.py.
#ifndef ELVA_CPU_RANKING_H_
#define ELVA_CPU_RANKING_H_

#include <math.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <type_traits>

#include "../elva.h"
#include "../rank_math.h"
#include "kernels.h"

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

// From the ranks; slopes[i] = d reward / d scores[i]. A score that is not finite makes all of them
// NaN.
template <class V>
GroupReward reward_of(const V* scores, const int32_t* ranks, int64_t count,
                      const ElvaRewardWeights& weights, double* slopes) {
  GroupReward out{0, 0, 0, ranks[0]};
  bool sound = true;
  int64_t hardest = 0;  // the first negative in the order
  const int32_t hardest_rank = ranks[0] == 1 ? 2 : 1;
  for (int64_t i = 0; i < count; ++i) {
    const double weight = rank_weight(i == 0, log_of_rank(ranks[i]), weights.rank_penalty);
    out.rank_reward += weight * static_cast<double>(scores[i]);
    slopes[i] = weights.w_rank * weight;
    sound = sound && std::isfinite(scores[i]);
    if (ranks[i] == hardest_rank) hardest = i;
  }
  if (!sound) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    std::fill(slopes, slopes + count, nan);
    return {nan, nan, nan, ranks[0]};
  }
  if (count > 1) out.margin_reward = margin_hinge(scores[0], scores[hardest], weights.margin);
  if (out.margin_reward > 0) {
    slopes[0] += weights.w_margin;
    slopes[hardest] -= weights.w_margin;
  }
  out.reward = weights.w_margin * out.margin_reward + weights.w_rank * out.rank_reward;
  return out;
}

}  // namespace elva
#endif  // ELVA_CPU_RANKING_H_
