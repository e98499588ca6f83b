// What: the ranking reward of given scores (re-rankers, cross-encoders), with its gradient on the
//   scores.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; rank (2), margin reward (3, 3g), rank
//   reward (4, 4g), reward (5), soft rank (6) of elva_kernels.reference.
// In: scores [*, C] (column 0 the positive) in bf16, fp16, fp32 or fp64, any strides; mask and
//   relevance [*, C - 1].
// Out: reward, margin_reward, rank_reward [*] in fp32 (fp64), rank int32 [*]; grad_scores [*, C] in
//   the scores' dtype.
// Work split: some groups a thread.
// Bytes: scores once, gradient once (the floor).
// Numerics: double; a live score that is not finite makes its group's reward and live gradients
//   NaN, as does a live relevance outside [0, 1]. Deterministic.
// Limits: fewer than 2^31 candidates a group, 8 leading dimensions that do not merge.
// Reference: elva_kernels.reference.reward_from_scores.
#include <algorithm>
#include <type_traits>

#include "arena.h"
#include "numeric.h"
#include "ranking.h"
#include "row_layout.h"

namespace elva {
namespace {

template <class V>
struct ScoreBuffers {
  static size_t arena_bytes(int64_t c) {
    return Arena::bytes_for<V>(c) + Arena::bytes_for<uint32_t>(c) + RankBuffers<V>::arena_bytes(c);
  }
  ScoreBuffers(int64_t c, Arena* arena)
      : scores(arena->take<V>(c)), live(arena->take<uint32_t>(c)), ranking(c, arena) {}

  V* scores;
  uint32_t* live;
  RankBuffers<V> ranking;
};

template <class T>
void one_group(const ElvaScoresArgs& args, const Kernels& kernels, int64_t i,
               const ScoreBuffers<typename ValueOf<T>::Type>& buffers) {
  using V = typename ValueOf<T>::Type;
  const GroupIndex index(args.batch, i);
  const Row<T> scores{group_data<T>(args.batch, args.scores, index), args.scores.stride};
  const bool* mask = group_data<bool>(args.batch, args.mask, index);
  int64_t count = 0;
  for (int64_t c = 0; c < args.candidates; ++c) {
    if (c > 0 && mask != nullptr && !mask[(c - 1) * args.mask.stride]) continue;
    buffers.live[count] = static_cast<uint32_t>(c);
    buffers.scores[count++] = static_cast<V>(to_double(scores[c]));
  }
  const V* relevance = static_cast<const V*>(args.relevance);
  if (relevance != nullptr) relevance += i * (args.candidates - 1);
  relevance = live_relevance<V>(relevance, buffers.live, count, buffers.ranking);
  const GroupReward out =
      reward_of<V>(kernels, buffers.scores, count, args.weights, relevance, buffers.ranking);
  if (args.reward != nullptr) {
    static_cast<V*>(args.reward)[i] = static_cast<V>(out.reward);
    static_cast<V*>(args.margin_reward)[i] = static_cast<V>(out.margin_reward);
    static_cast<V*>(args.rank_reward)[i] = static_cast<V>(out.rank_reward);
    args.rank[i] = out.rank;
  }
  if (args.grad_scores != nullptr) {
    add_soft_slopes<V>(kernels, buffers.scores, count, args.weights, relevance, buffers.ranking);
    const V* upstream = group_data<V>(args.batch, args.upstream, index);
    const double factor = upstream == nullptr ? 1.0 : static_cast<double>(*upstream);
    T* grad = static_cast<T*>(args.grad_scores) + i * args.candidates;
    for (int64_t c = 0; c < args.candidates; ++c) from_double(0.0, grad + c);
    for (int64_t j = 0; j < count; ++j)
      from_double(factor * buffers.ranking.slopes[j], grad + buffers.live[j]);
  }
}

template <class T>
ElvaStatus run(const ElvaScoresArgs& args) {
  using V = typename ValueOf<T>::Type;
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) return ELVA_BAD_LEVEL;
  const auto piece = [&](int64_t begin, int64_t end, Arena* arena) {
    const ScoreBuffers<V> buffers(args.candidates, arena);
    for (int64_t i = begin; i < end; ++i) one_group<T>(args, *kernels, i, buffers);
  };
  constexpr int64_t kCandidatesPerPiece = 4096;  // about 20 us
  constexpr int64_t kPairsPerCandidate = 8;      // that take soft ranks as long (measured)
  int64_t work = args.candidates;
  if (args.weights.rank_temperature > 0) work += work * work / kPairsPerCandidate;
  return for_pieces(args.batch.groups, std::max<int64_t>(1, kCandidatesPerPiece / work),
                    args.threads, ScoreBuffers<V>::arena_bytes(args.candidates), piece);
}

}  // namespace
}  // namespace elva

extern "C" ElvaStatus elva_reward_from_scores_cpu(const ElvaScoresArgs* args) {
  return elva::by_dtype(args->dtype,
                        [args](auto element) { return elva::run<decltype(element)>(*args); });
}
