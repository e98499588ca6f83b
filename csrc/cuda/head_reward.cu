// What: the ranking reward of in-batch queries out of their positives' ranks and scores and those
//   of their hardest negatives, or its slopes on these scores.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; margin reward (3), reward (5), rank reward
//   of a head (12) of elva_kernels.reference.
// In: scores [B, P + h] in fp32, negatives descending, -inf behind them; ranks int32 [B, P], 0 for
//   no positive.
// Out: rewards [B], or slopes [B, P + h], in fp32.
// Work split: a warp a query, a lane every 32nd score.
// Bytes: scores once from memory; with several positives the negatives once each from cache.
// Numerics: double, rounded once; sums by lanes and a tree. Deterministic.
// Limits: none.
// Reference: elva_kernels.reference.reward_of_head, head_slopes.
#include "../elva_in_batch_cuda.h"
#include "../rank_math.h"
#include "scores.h"

namespace elva {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

__device__ inline int lane() { return static_cast<int>(threadIdx.x % 32); }

// One query's scores.
struct Head {
  const ElvaCudaHeadRewardArgs& args;
  const float *positive, *negative;
  const int32_t* rank;
  double positives = 0;  // that are there, 1 for none
  bool some = false;     // of them are finite

  __device__ Head(const ElvaCudaHeadRewardArgs& args, int64_t i)
      : args(args),
        positive(args.scores + i * (args.positives + args.negatives)),
        negative(positive + args.positives),
        rank(args.rank + i * args.positives) {
    for (int64_t p = 0; p < args.positives; ++p) {
      positives += rank[p] != 0;
      some = some || is_sound(p);
    }
    if (positives < 1) positives = 1;
  }

  __device__ bool is_live(int64_t j) const { return j < args.negatives && negative[j] > -INFINITY; }
  __device__ bool is_sound(int64_t p) const { return rank[p] != 0 && isfinite(positive[p]); }
  __device__ double hinge(int64_t p) const {
    return is_live(0) ? margin_hinge(positive[p], negative[0], args.weights.margin) : 0.0;
  }
  __device__ double contrast(int64_t p) const {
    return rank_weight(true, log(static_cast<double>(rank[p])), 0);
  }
  // d R_rank / d s of a negative, for a positive's sake.
  __device__ double weight(int64_t p, int64_t j) const {
    const int64_t place = j + (positive[p] > negative[j] ? 2 : 1);
    return place > args.head
               ? 0.0
               : rank_weight(false, log(static_cast<double>(place)), args.weights.rank_penalty);
  }
};

__device__ inline void write_reward(const Head& head, int64_t i) {
  const ElvaCudaHeadRewardArgs& args = head.args;
  double margin_reward = 0, rank_reward = 0, penalty = 0;
  for (int64_t p = 0; p < args.positives; ++p) {
    if (head.rank[p] == 0) continue;
    if (!isfinite(head.positive[p])) margin_reward = nan("");
    margin_reward += head.hinge(p);
    rank_reward += head.positive[p] * head.contrast(p);
    for (int64_t j = lane(); head.is_live(j); j += 32) {
      penalty += head.negative[j] * head.weight(p, j);
    }
  }
  rank_reward = (rank_reward + warp_sum(penalty)) / head.positives;
  margin_reward /= head.positives;
  if (isnan(margin_reward)) rank_reward = margin_reward;
  if (lane() > 0) return;
  const double reward = args.weights.w_margin * margin_reward + args.weights.w_rank * rank_reward;
  args.reward[i] = static_cast<float>(reward);
  args.margin_reward[i] = static_cast<float>(margin_reward);
  args.rank_reward[i] = static_cast<float>(rank_reward);
}

__device__ inline void write_slopes(const Head& head, int64_t i) {
  const ElvaCudaHeadRewardArgs& args = head.args;
  float* slopes = args.slopes + i * (args.positives + args.negatives);
  const double share = args.grad_reward[i] / head.positives;
  const auto hinge = [&](int64_t p) { return head.hinge(p) > 0 ? args.weights.w_margin : 0.0; };
  for (int64_t p = lane(); p < args.positives; p += 32) {
    const double slope = head.is_sound(p) ? hinge(p) + args.weights.w_rank * head.contrast(p) : 0.0;
    slopes[p] = static_cast<float>(head.is_sound(p) ? share * slope : 0.0);
  }
  for (int64_t j = lane(); j < args.negatives; j += 32) {
    double sum = 0;
    for (int64_t p = 0; head.is_live(j) && p < args.positives; ++p) {
      if (!head.is_sound(p)) continue;
      sum += args.weights.w_rank * head.weight(p, j);
      if (j == 0) sum -= hinge(p);
    }
    slopes[args.positives + j] =
        static_cast<float>(head.some && head.is_live(j) ? share * sum : 0.0);
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    head_reward(const __grid_constant__ ElvaCudaHeadRewardArgs args) {
  const int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (i >= args.rows) return;
  const Head head(args, i);
  if (args.slopes == nullptr) {
    write_reward(head, i);
  } else {
    write_slopes(head, i);
  }
}

}  // namespace
}  // namespace elva

extern "C" ElvaStatus elva_head_reward_cuda(const ElvaCudaHeadRewardArgs* args) {
  using namespace elva;
  return on_device(ELVA_FP32, args->device, [args](auto) {
    return launch(head_reward, blocks_of(args->rows, kWarps), 0, kThreads, 0, args->stream, *args);
  });
}
