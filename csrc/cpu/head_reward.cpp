// What: the ranking reward of in-batch queries out of their positives' ranks and scores and those
//   of their hardest negatives, or its slopes on these scores.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; margin reward (3), reward (5), rank reward
//   of a head (12) of elva_kernels.reference.
// In: scores [B, P + h] in fp32 or fp64, negatives descending, -inf behind them; ranks int32
//   [B, P], 0 for no positive.
// Out: rewards [B], or slopes [B, P + h], in the scores' dtype.
// Work split: some queries a thread.
// Bytes: scores once.
// Numerics: double, rounded once. Deterministic.
// Limits: none.
// Reference: elva_kernels.reference.reward_of_head, head_slopes.
#include <math.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../elva_in_batch.h"
#include "numeric.h"
#include "parallel.h"
#include "ranking.h"

namespace elva {
namespace {

constexpr int64_t kTermsPerPiece = 1 << 14;  // about 20 us

// d R_rank / d s of a negative whose rank is within the head.
double weight_of(const ElvaHeadRewardArgs& args, int64_t rank) {
  return rank > args.head ? 0.0 : rank_weight(false, log_of_rank(rank), args.weights.rank_penalty);
}

// One query's scores.
template <class S>
struct Head {
  const S* positive;
  const S* negative;
  const int32_t* rank;
  int64_t live;      // negatives that are there
  double positives;  // that are there, 1 for none

  Head(const ElvaHeadRewardArgs& args, int64_t i)
      : positive(static_cast<const S*>(args.scores) + i * (args.positives + args.negatives)),
        negative(positive + args.positives),
        rank(args.rank + i * args.positives) {
    const auto is_there = [](S score) { return score > -std::numeric_limits<S>::infinity(); };
    live = std::find_if_not(negative, negative + args.negatives, is_there) - negative;
    const int64_t count = args.positives - std::count(rank, rank + args.positives, 0);
    positives = static_cast<double>(std::max<int64_t>(count, 1));
  }

  double contrast(int64_t p) const { return rank_weight(true, log_of_rank(rank[p]), 0); }

  double hinge(int64_t p, double margin) const {
    return live == 0 ? 0.0 : margin_hinge(positive[p], negative[0], margin);
  }

  // The negatives before this place have no higher rank for the positive's sake.
  int64_t place(int64_t p) const {
    const auto is_behind = [&](S score) { return positive[p] > score; };
    return std::find_if(negative, negative + live, is_behind) - negative;
  }
};

template <class S>
void reward_of_row(const ElvaHeadRewardArgs& args, int64_t i) {
  const Head<S> head(args, i);
  double margin_reward = 0, rank_reward = 0;
  for (int64_t p = 0; p < args.positives; ++p) {
    if (head.rank[p] == 0) continue;
    if (!std::isfinite(head.positive[p])) {
      margin_reward = rank_reward = std::numeric_limits<double>::quiet_NaN();
      break;
    }
    margin_reward += head.hinge(p, args.weights.margin);
    rank_reward += static_cast<double>(head.positive[p]) * head.contrast(p);
    const int64_t place = head.place(p);
    for (int64_t j = 0; j < head.live; ++j) {
      const int64_t rank = j + (j < place ? 1 : 2);
      rank_reward += static_cast<double>(head.negative[j]) * weight_of(args, rank);
    }
  }
  margin_reward /= head.positives;
  rank_reward /= head.positives;
  const double reward = args.weights.w_margin * margin_reward + args.weights.w_rank * rank_reward;
  static_cast<S*>(args.reward)[i] = static_cast<S>(reward);
  static_cast<S*>(args.margin_reward)[i] = static_cast<S>(margin_reward);
  static_cast<S*>(args.rank_reward)[i] = static_cast<S>(rank_reward);
}

// sums: [negatives].
template <class S>
void slopes_of_row(const ElvaHeadRewardArgs& args, int64_t i, double* sums) {
  const Head<S> head(args, i);
  S* slopes = static_cast<S*>(args.slopes) + i * (args.positives + args.negatives);
  const double upstream = static_cast<double>(static_cast<const S*>(args.grad_reward)[i]);
  const double share = upstream / head.positives;
  std::fill(sums, sums + args.negatives, 0.0);
  bool some = false;
  for (int64_t p = 0; p < args.positives; ++p) {
    slopes[p] = 0;
    if (head.rank[p] == 0 || !std::isfinite(head.positive[p])) continue;
    some = true;
    const double hinge = head.hinge(p, args.weights.margin) > 0 ? args.weights.w_margin : 0.0;
    slopes[p] = static_cast<S>(share * (hinge + args.weights.w_rank * head.contrast(p)));
    const int64_t place = head.place(p);
    for (int64_t j = 0; j < head.live; ++j)
      sums[j] += args.weights.w_rank * weight_of(args, j + (j < place ? 1 : 2));
    if (head.live > 0) sums[0] -= hinge;
  }
  for (int64_t j = 0; j < args.negatives; ++j)
    slopes[args.positives + j] = static_cast<S>(some && j < head.live ? share * sums[j] : 0.0);
}

template <class S>
ElvaStatus head_reward(const ElvaHeadRewardArgs& args) {
  const int64_t terms = args.positives * (args.negatives + 1);
  return for_pieces(args.rows, std::max<int64_t>(1, kTermsPerPiece / terms), args.threads,
                    [&](int64_t begin, int64_t end) {
                      std::vector<double> sums(static_cast<size_t>(args.negatives));
                      for (int64_t i = begin; i < end; ++i) {
                        if (args.slopes == nullptr) {
                          reward_of_row<S>(args, i);
                        } else {
                          slopes_of_row<S>(args, i, sums.data());
                        }
                      }
                    });
}

}  // namespace
}  // namespace elva

extern "C" ElvaStatus elva_head_reward_cpu(const ElvaHeadRewardArgs* args) {
  return elva::by_value_dtype(
      args->dtype, [args](auto value) { return elva::head_reward<decltype(value)>(*args); });
}
