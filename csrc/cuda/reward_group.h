// One group of the grouped reward on one block of threads: from dots and norms to ranks, reward and
// the coefficients of the gradients: cosine (1), rank (2), margin reward (3), rank reward (4),
// reward (5), soft rank (6) of elva_kernels.reference; graded: (3g) and (4g), of negatives that are
// relevant themselves.
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

// What a block knows of its group, in shared memory or in memory of its own on 16 bytes.
struct Group {
  enum { kRankReward, kMarginReward, kQuery, kQueryInverse, kUpstream, kTotals };
  double* total;    // [kTotals]: of total_group, and what its block keeps of the group
  int* top;         // [2], the candidates of ranks 1 and 2; 0 where there is none. Graded: the
                    //   hardest negative twice
  uint64_t* key;    // greater comes first; 0 for masked ones and beyond the last
  double* pull;     // slope times score; in the memory of the keys, once there are ranks
  double* score;    // before clamping; NaN where not finite
  double* inverse;  // 1 / |row|, in true units; 0 for a zero row
  double* weight;   // d R_rank / d score at fixed ranks
  double* soft;     // d R_rank / d soft rank, or
  double* log_of;   //   ln (i + 1), where ranks are integers
  float* value;     // the clamped score
  int* rank;
  bool* live;

  static constexpr size_t kHead = 48;
  static constexpr size_t kBytesPerCandidate =
      sizeof(uint64_t) + 4 * sizeof(double) + sizeof(float) + sizeof(int) + sizeof(bool);

  __host__ __device__ static int64_t keys(int64_t candidates) { return (candidates + 3) / 4 * 4; }
  __host__ __device__ static size_t bytes(int64_t candidates) {
    return (kHead + static_cast<size_t>(keys(candidates)) * kBytesPerCandidate + 15) / 16 * 16;
  }

  __device__ Group(unsigned char* memory, int64_t candidates) {
    const int64_t room = keys(candidates);
    total = reinterpret_cast<double*>(memory);
    top = reinterpret_cast<int*>(total + kTotals);
    key = reinterpret_cast<uint64_t*>(memory + kHead);
    pull = reinterpret_cast<double*>(key);
    score = reinterpret_cast<double*>(key + room);
    inverse = score + room;
    weight = inverse + room;
    soft = log_of = weight + room;
    value = reinterpret_cast<float*>(soft + room);
    rank = reinterpret_cast<int*>(value + room);
    live = reinterpret_cast<bool*>(rank + room);
  }

  // Before any group whose ranks are integers: what they all read. All threads; a barrier after.
  __device__ void open(int64_t candidates) const {
    for (int64_t c = threadIdx.x; c < candidates; c += blockDim.x) {
      log_of[c] = log(static_cast<double>(c + 1));
    }
  }

  // A candidate's own facts, from one thread. `dot` and the inverse norms in any common units of the
  // rows; 0 for a zero row, NaN for one that is not finite.
  __device__ void set(int64_t c, bool is_live, double dot, double query_inverse, double own_inverse,
                      double true_inverse) const {
    const double s = dot * (query_inverse * own_inverse);
    live[c] = is_live;
    score[c] = s;
    inverse[c] = true_inverse;
    value[c] = static_cast<float>(s > 1 ? 1.0 : s < -1 ? -1.0 : s);
    key[c] = is_live ? rank_key<float>(value[c], static_cast<uint32_t>(c)) : 0;
  }
  // What `set` leaves, from one thread of those that set all.
  __device__ void set_rest(int64_t candidates) const {
    top[0] = top[1] = 0;
    for (int64_t c = candidates; c < keys(candidates); ++c) key[c] = 0;
  }

  __device__ int hardest() const { return top[0] == 0 ? top[1] : top[0]; }
  __device__ double margin_reward(double margin) const {
    return hardest() == 0 ? 0 : margin_hinge(value[0], value[hardest()], margin);
  }
  // The same after rank_group; graded, total_group has not been yet.
  template <bool kGraded>
  __device__ double hinge(double margin) const {
    return kGraded ? total[kMarginReward] : margin_reward(margin);
  }
};

// 1 / |row| of its square; 0 for a zero row, and NaN stays.
__device__ inline double inverse_of(double square) { return square > 0 ? rsqrt(square) : square; }

__device__ inline double sigmoid(double x) { return 1 / (1 + exp(-x)); }

// d sigmoid at (value[i] - value[k]) / temperature; the same both ways round.
__device__ inline double sigmoid_slope(const Group& group, int64_t i, int64_t k,
                                       double temperature) {
  const double s = sigmoid((static_cast<double>(group.value[i]) - group.value[k]) / temperature);
  return s * (1 - s) / temperature;
}

// Of candidate c: 1 + the sigmoids of all others.
__device__ inline double soft_rank(const Group& group, int64_t candidates, int64_t c,
                                   double temperature) {
  double place = 1;
#pragma unroll 1
  for (int64_t other = 0; other < candidates; ++other) {
    if (other == c || !group.live[other]) continue;
    const double gap = static_cast<double>(group.value[other]) - group.value[c];
    place += sigmoid(gap / temperature);
  }
  return place;
}

// Of a group's negatives.
__device__ inline const float* relevance_of(const ElvaRewardArgs& args, int64_t index) {
  return static_cast<const float*>(args.relevance) + index * args.negatives;
}

// d R_rank / d score of candidate c, (4) or (4g), and its derivative on the rank.
template <bool kGraded>
__device__ inline double weight_of(int64_t c, double log_rank, double rank_penalty, double grade) {
  return kGraded && c > 0 ? graded_rank_weight(log_rank, rank_penalty, grade)
                          : rank_weight(c == 0, log_rank, rank_penalty);
}
template <bool kGraded>
__device__ inline double weight_slope_of(int64_t c, double rank, double rank_penalty,
                                         double grade) {
  return kGraded && c > 0 ? graded_rank_weight_slope(rank, rank_penalty, grade)
                          : rank_weight_slope(c == 0, rank, rank_penalty);
}

// Eq. (3g): the hardest negative, of equal ones the first, and the margin reward. The last warp,
// which ranks the fewest.
__device__ inline void grade_margin(const Group& group, int64_t candidates, double margin,
                                    const float* relevance) {
  if (threadIdx.x / 32 != blockDim.x / 32 - 1) return;
  const int lane = static_cast<int>(threadIdx.x % 32);
  double hardest = -INFINITY;
  int at = 0;
#pragma unroll 1  // addresses of several would spill
  for (int64_t c = lane + 1; c < candidates; c += 32) {
    if (!group.live[c]) continue;
    const double rival = graded_rival(group.value[c], margin, relevance[c - 1]);
    if (rival > hardest) hardest = rival, at = static_cast<int>(c);
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    const double theirs = __shfl_xor_sync(kAllLanes, hardest, offset);
    const int place = __shfl_xor_sync(kAllLanes, at, offset);
    if (theirs > hardest || (theirs == hardest && place < at)) hardest = theirs, at = place;
  }
  if (lane != 0) return;
  group.top[0] = group.top[1] = at;
  group.total[Group::kMarginReward] = at == 0 ? 0 : margin_hinge(group.value[0], hardest, margin);
}

// Ranks, two threads a candidate, and what they weigh. kSoft: the temperature of ranks is above 0.
// kGraded: `relevance` [candidates - 1] counts; returns whether this thread's live ones are in
// [0, 1]. All threads; `set` and a barrier before.
template <bool kSoft, bool kGraded>
__device__ inline bool rank_group(const Group& group, int64_t candidates,
                                  const ElvaRewardWeights& weights, const float* relevance) {
  bool sound = true;
  if constexpr (kGraded) grade_margin(group, candidates, weights.margin, relevance);
  const bool first = threadIdx.x % 2 == 0;
  for (int64_t at = 0; at < candidates; at += blockDim.x / 2) {
    const int64_t c = at + threadIdx.x / 2;
    const uint64_t own = c < candidates ? group.key[c] : 0;
    int before = 0;
#pragma unroll 4
    for (int64_t other = first ? 0 : 2; other < candidates; other += 4) {
      const Vector<uint64_t> two = load16(group.key + other);
      before += two.at[0] > own ? 1 : 0;
      before += two.at[1] > own ? 1 : 0;
    }
    before += __shfl_xor_sync(kAllLanes, before, 1);
    if (!first || c >= candidates) continue;
    if (!group.live[c]) {
      group.weight[c] = 0;
      if (kSoft) group.soft[c] = 0;
      continue;
    }
    group.rank[c] = before + 1;
    if (!kGraded && before < 2) group.top[before] = static_cast<int>(c);
    const double grade = kGraded && c > 0 ? relevance[c - 1] : 0.0;
    sound = sound && is_relevance(grade);
    if constexpr (kSoft) {
      const double place = soft_rank(group, candidates, c, weights.rank_temperature);
      group.weight[c] = weight_of<kGraded>(c, log(place), weights.rank_penalty, grade);
      group.soft[c] =
          group.value[c] * weight_slope_of<kGraded>(c, place, weights.rank_penalty, grade);
    } else {
      group.weight[c] = weight_of<kGraded>(c, group.log_of[before], weights.rank_penalty, grade);
    }
  }
  return sound;
}

// rank_group and the barrier behind it; whether the group is sound, as it was before and by its
// relevance.
template <bool kSoft, bool kGraded>
__device__ inline bool rank_sound(const Group& group, int64_t candidates, bool sound,
                                  const ElvaRewardArgs& args, int64_t index) {
  const float* relevance = kGraded ? relevance_of(args, index) : nullptr;
  const bool fine = rank_group<kSoft, kGraded>(group, candidates, args.weights, relevance);
  if constexpr (kGraded) return __syncthreads_or(!fine) == 0 && sound;
  __syncthreads();
  return sound;
}

// The whole d reward / d score of a candidate.
template <bool kSoft, bool kGraded>
__device__ inline double slope_of(const Group& group, int64_t candidates, int64_t c,
                                  const ElvaRewardWeights& weights) {
  double slope = weights.w_rank * group.weight[c];
  if (group.hinge<kGraded>(weights.margin) > 0) {
    if (c == 0) slope += weights.w_margin;
    if (c == group.hardest()) slope -= weights.w_margin;
  }
  if constexpr (kSoft) {
#pragma unroll 1
    for (int64_t other = 0; other < candidates; ++other) {
      if (other == c || !group.live[other]) continue;
      slope += weights.w_rank * (group.soft[other] - group.soft[c]) *
               sigmoid_slope(group, other, c, weights.rank_temperature);
    }
  }
  return slope;
}

// Coefficients of the rows for an upstream gradient of 1, into `a` and `b` [candidates]; NaN where
// the group is not sound. All threads; rank_group and a barrier before.
template <bool kSoft, bool kGraded>
__device__ inline void set_coefficients(const Group& group, int64_t candidates, bool sound,
                                        double query_inverse, const ElvaRewardWeights& weights,
                                        double* a, double* b) {
  for (int64_t c = threadIdx.x; c < candidates; c += blockDim.x) {
    const double inverse = group.inverse[c], both = query_inverse * inverse;
    double slope = 0;
    if (group.live[c] && !sound) {
      slope = nan("");
    } else if (group.live[c] && both > 0) {
      slope = slope_of<kSoft, kGraded>(group, candidates, c, weights);
    }
    const double pull = slope * group.score[c];
    group.pull[c] = slope == 0 ? 0 : pull;
    a[c] = slope == 0 ? 0 : slope * both;
    b[c] = slope == 0 ? 0 : -pull * inverse * inverse;
    if (isnan(slope)) a[c] = b[c] = group.pull[c] = slope;
  }
}

// Rewards, and the query's own coefficient: the sum of a c + b q, where b = -sum of pulls / |q|^2.
// One warp; set_coefficients and a barrier before.
template <bool kGraded>
__device__ inline void total_group(const Group& group, int64_t candidates, bool sound,
                                   double query_inverse, const ElvaRewardWeights& weights) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  double reward = 0, pull = 0;
  for (int64_t c = lane; c < candidates; c += 32) {
    if (!group.live[c]) continue;
    reward += group.weight[c] * group.value[c];
    pull += group.pull[c];
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    reward += __shfl_xor_sync(kAllLanes, reward, offset);
    pull += __shfl_xor_sync(kAllLanes, pull, offset);
  }
  if (lane != 0) return;
  group.total[Group::kRankReward] = sound ? reward : nan("");
  group.total[Group::kMarginReward] = sound ? group.hinge<kGraded>(weights.margin) : nan("");
  group.total[Group::kQuery] = -pull * query_inverse * query_inverse;
}

// What the caller gets of the candidates. All threads; rank_group and a barrier before.
__device__ inline void write_scores(const ElvaRewardArgs& args, int64_t index, const Group& group) {
  const int64_t candidates = args.negatives + 1;
  float* scores = static_cast<float*>(args.scores) + index * candidates;
  for (int64_t c = threadIdx.x; c < candidates; c += blockDim.x) {
    scores[c] = group.live[c] ? group.value[c] : -INFINITY;
  }
}

// And of the group. One thread, that of total_group's first lane.
__device__ inline void write_rewards(const ElvaRewardArgs& args, int64_t index,
                                     const Group& group) {
  const double margin = group.total[Group::kMarginReward], rank = group.total[Group::kRankReward];
  static_cast<float*>(args.margin_reward)[index] = static_cast<float>(margin);
  static_cast<float*>(args.rank_reward)[index] = static_cast<float>(rank);
  static_cast<float*>(args.reward)[index] =
      static_cast<float>(args.weights.w_margin * margin + args.weights.w_rank * rank);
  args.rank[index] = group.rank[0];
}

}  // namespace elva
#endif  // ELVA_CUDA_REWARD_GROUP_H_
