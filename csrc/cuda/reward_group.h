// One group of the grouped reward on one block of threads: from dots and norms to ranks, reward and
// the coefficients of the gradients: cosine (1), rank (2), margin reward (3), rank reward (4),
// reward (5), soft rank (6) of elva_kernels.reference.
//
// Coefficients, a group: a[C], b[C] and the query's b, C = negatives + 1, in double and true units:
//   gradient row i = a q + b c,  gradient of the query = sum of a c + b q
// 0 for a masked or zero row. Doubles hold them whatever the norms of float rows are.
#ifndef ELVA_CUDA_REWARD_GROUP_H_
#define ELVA_CUDA_REWARD_GROUP_H_

#include "../rank_math.h"
#include "device.h"

namespace elva {

// Squares of rows in this range keep float products exact to a power of two; others are scaled.
constexpr double kSmallestSquare = 0x1p-20, kLargestSquare = 0x1p60;

__device__ inline bool is_in_range(double square) {
  return square >= kSmallestSquare && square <= kLargestSquare;
}

// What a block knows of its group, in shared memory or in memory of its own.
struct Group {
  uint64_t* key;
  double* score;   // before clamping; NaN where not finite
  double* norm;    // of the row, in true units; 0 for a zero row
  double* weight;  // d R_rank / d score at fixed ranks
  double* soft;    // d R_rank / d soft rank
  float* value;    // the clamped score
  int* rank;
  bool* live;
  double* total;  // [kTotals]

  enum { kRankReward, kMarginReward, kQuery, kSound, kHardest, kTotals };
  static constexpr size_t kBytesPerCandidate =
      sizeof(uint64_t) + 4 * sizeof(double) + sizeof(float) + sizeof(int) + sizeof(bool);

  __host__ __device__ static size_t bytes(int64_t candidates) {
    return (kTotals * sizeof(double) + static_cast<size_t>(candidates) * kBytesPerCandidate + 15) /
           16 * 16;
  }

  // `memory` on 8 bytes.
  __device__ Group(unsigned char* memory, int64_t candidates) {
    total = reinterpret_cast<double*>(memory);
    key = reinterpret_cast<uint64_t*>(total + kTotals);
    score = reinterpret_cast<double*>(key + candidates);
    norm = score + candidates;
    weight = norm + candidates;
    soft = weight + candidates;
    value = reinterpret_cast<float*>(soft + candidates);
    rank = reinterpret_cast<int*>(value + candidates);
    live = reinterpret_cast<bool*>(rank + candidates);
  }

  // A candidate's own facts, from one thread. dot and norms in any common units of the rows.
  __device__ void set(int64_t c, bool is_live, double dot, double query_norm, double own_norm,
                      double true_norm) const {
    double s = 0;
    if (isnan(own_norm) || isnan(query_norm)) {
      s = nan("");
    } else if (own_norm > 0 && query_norm > 0) {
      s = dot / (query_norm * own_norm);
    }
    live[c] = is_live;
    score[c] = s;
    norm[c] = true_norm;
    value[c] = static_cast<float>(s > 1 ? 1.0 : s < -1 ? -1.0 : s);
    key[c] = is_live ? rank_key<float>(value[c], static_cast<uint32_t>(c)) : 0;  // behind all
  }
};

__device__ inline double sigmoid(double x) { return 1 / (1 + exp(-x)); }

// d sigmoid at (value[i] - value[k]) / temperature; the same both ways round.
__device__ inline double sigmoid_slope(const Group& group, int64_t i, int64_t k,
                                       double temperature) {
  const double s = sigmoid((static_cast<double>(group.value[i]) - group.value[k]) / temperature);
  return s * (1 - s) / temperature;
}

// Ranks, and what they weigh. All threads; `set` and a barrier before.
__device__ inline void rank_group(const Group& group, int64_t candidates,
                                  const ElvaRewardWeights& weights) {
  const double temperature = weights.rank_temperature;
  for (int64_t c = threadIdx.x; c < candidates; c += blockDim.x) {
    if (!group.live[c]) {
      group.weight[c] = group.soft[c] = 0;
      continue;
    }
    int rank = 1;
    const uint64_t own = group.key[c];
    for (int64_t other = 0; other < candidates; ++other) {
      rank += group.key[other] > own ? 1 : 0;
    }
    double place = rank;
    if (temperature > 0) {
      place = 1;
      for (int64_t other = 0; other < candidates; ++other) {
        if (other == c || !group.live[other]) continue;
        const double gap = static_cast<double>(group.value[other]) - group.value[c];
        place += sigmoid(gap / temperature);
      }
    }
    group.rank[c] = rank;
    group.weight[c] = rank_weight(c == 0, log(place), weights.rank_penalty);
    if (temperature > 0) {
      group.soft[c] = group.value[c] * rank_weight_slope(c == 0, place, weights.rank_penalty);
    }
  }
}

// Rewards into `total`. The first warp; a barrier before and after.
__device__ inline void total_group(const Group& group, int64_t candidates,
                                   const ElvaRewardWeights& weights) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int hardest_rank = group.rank[0] == 1 ? 2 : 1;
  double reward = 0, bad = 0, hardest = 0;
  for (int64_t c = lane; c < candidates; c += 32) {
    if (!group.live[c]) continue;
    reward += group.weight[c] * group.value[c];
    bad += isfinite(group.value[c]) ? 0 : 1;
    if (c > 0 && group.rank[c] == hardest_rank) hardest += static_cast<double>(c);  // one does
  }
  reward = warp_sum(reward);
  bad = warp_sum(bad);
  hardest = warp_sum(hardest);
  if (lane != 0) return;
  double margin = 0;
  if (hardest > 0) {
    margin =
        margin_hinge(group.value[0], group.value[static_cast<int64_t>(hardest)], weights.margin);
  }
  if (bad > 0) reward = margin = nan("");
  group.total[Group::kRankReward] = reward;
  group.total[Group::kMarginReward] = margin;
  group.total[Group::kSound] = bad > 0 ? 0 : 1;
  group.total[Group::kHardest] = hardest;
}

// The whole d reward / d score of a candidate.
__device__ inline double slope_of(const Group& group, int64_t candidates, int64_t c,
                                  const ElvaRewardWeights& weights) {
  if (group.total[Group::kSound] == 0) return nan("");
  double slope = weights.w_rank * group.weight[c];
  if (group.total[Group::kMarginReward] > 0) {
    if (c == 0) slope += weights.w_margin;
    if (c == static_cast<int64_t>(group.total[Group::kHardest])) slope -= weights.w_margin;
  }
  if (weights.rank_temperature > 0) {
    for (int64_t other = 0; other < candidates; ++other) {
      if (other == c || !group.live[other]) continue;
      slope += weights.w_rank * (group.soft[other] - group.soft[c]) *
               sigmoid_slope(group, other, c, weights.rank_temperature);
    }
  }
  return slope;
}

// Coefficients of the rows for an upstream gradient of 1, into `a` and `b` [candidates]. All
// threads; total_group and a barrier before.
__device__ inline void set_coefficients(const Group& group, int64_t candidates, double query_norm,
                                        const ElvaRewardWeights& weights, double* a, double* b) {
  for (int64_t c = threadIdx.x; c < candidates; c += blockDim.x) {
    const double slope = group.live[c] ? slope_of(group, candidates, c, weights) : 0;
    const double norm = group.norm[c];
    const bool counts = group.live[c] && norm > 0 && query_norm > 0;
    a[c] = counts ? slope / (query_norm * norm) : 0;
    b[c] = counts ? -slope * group.score[c] / (norm * norm) : 0;
    if (group.live[c] && isnan(slope)) a[c] = b[c] = slope;
  }
}

// The query's own coefficient into `total[kQuery]`, from those of the rows: sum of a c + b q, where
// b = -sum of slope s / |q|^2, and slope s = -b_c |c|^2. The first warp; barriers around.
__device__ inline void total_query(const Group& group, int64_t candidates, double query_norm,
                                   const double* b) {
  double sum = 0;
  for (int64_t c = static_cast<int64_t>(threadIdx.x % 32); c < candidates; c += 32) {
    if (!group.live[c]) continue;
    if (isnan(b[c])) {
      sum += b[c];
    } else if (group.norm[c] > 0) {
      sum += b[c] * group.norm[c] * group.norm[c];
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) {
    group.total[Group::kQuery] = isnan(sum)       ? sum
                                 : query_norm > 0 ? sum / (query_norm * query_norm)
                                                  : 0;
  }
}

// What the caller gets of a group but its gradients. All threads.
__device__ inline void write_group(const ElvaRewardArgs& args, int64_t index, const Group& group) {
  const int64_t candidates = args.negatives + 1;
  float* scores = static_cast<float*>(args.scores) + index * candidates;
  for (int64_t c = threadIdx.x; c < candidates; c += blockDim.x) {
    scores[c] = group.live[c] ? group.value[c] : -INFINITY;
  }
  if (threadIdx.x != 0) return;
  const double margin = group.total[Group::kMarginReward], rank = group.total[Group::kRankReward];
  static_cast<float*>(args.margin_reward)[index] = static_cast<float>(margin);
  static_cast<float*>(args.rank_reward)[index] = static_cast<float>(rank);
  static_cast<float*>(args.reward)[index] =
      static_cast<float>(args.weights.w_margin * margin + args.weights.w_rank * rank);
  args.rank[index] = group.rank[0];
}

}  // namespace elva
#endif  // ELVA_CUDA_REWARD_GROUP_H_
