// What: the grouped ranking reward on the CPU: cosines, ranks, rewards and their gradients, fused.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; cosine (1), rank (2), margin reward
//   (3, 3g), rank reward (4, 4g), reward (5), soft rank (6) of elva_kernels.reference.
// In: query, positive [*, D], negatives [*, N, D], or a bank [M, D] and an index [*, N], in bf16,
//   fp16, fp32 or fp64, any strides; mask [*, N], relevance [*, N].
// Out: reward, margin_reward, rank_reward [*], scores [*, N + 1] in fp32 (fp64), rank int32 [*];
//   gradients dense, in the inputs' dtype; a bank's: reward_bank.cpp.
// Work split: one group a thread at a time; a group's rows stay in the second-level cache for the
//   gradient pass.
// Bytes: value and gradient read each input once and write each gradient that is wanted once (the
//   floor); a backward of its own reads the inputs again, and 16 bytes of coefficients a candidate.
// Numerics: see reward_simd.cpp and rescale.h; ranks, rewards and coefficients in double from the
//   returned scores. Deterministic: a group's bits depend on that group alone.
// Limits: fewer than 2^31 candidates a group, 8 leading dimensions that do not merge.
// Reference: elva_kernels.reference.ranking_reward.
#include <algorithm>

#include "arena.h"
#include "reward_group.h"

namespace elva {
namespace {

// Below this many bytes a thread, waking one costs more than it brings (measured: about 10 us).
constexpr int64_t kBytesPerThread = 192 << 10;
// As many bytes take as long as soft ranks take for a pair of candidates (measured: 0.4 ns, with
// slopes 0.9).
constexpr int64_t kBytesPerPair = 8;
// Gradients larger than this leave the caches before anyone reads them, so they are written past
// the caches.
constexpr int64_t kStreamBytes = 4 << 20;

template <class T>
NegativeRows<T> negatives_of(const ElvaRewardArgs& args, const GroupIndex& group) {
  const int64_t* index = group_data<int64_t>(args.batch, args.index, group);
  const T* data = index == nullptr ? group_data<T>(args.batch, args.negative, group)
                                   : static_cast<const T*>(args.negative.data);
  return {data,  args.negative.row_stride, args.negative.stride,
          index, args.index.stride,        args.bank_rows};
}

// Calls body(begin, end, group) on pieces of the batch, with a RewardGroup of the thread.
template <class T, class Body>
ElvaStatus for_groups(const ElvaRewardArgs& args, const Body& body) {
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) return ELVA_BAD_LEVEL;
  const int64_t candidates = args.negatives + 1;
  int64_t group_bytes = (candidates + 1) * args.dim * static_cast<int64_t>(sizeof(T)) + 1;
  if (args.weights.rank_temperature > 0) group_bytes += kBytesPerPair * candidates * candidates;
  const int64_t threads =
      std::min<int64_t>(args.threads, 1 + args.batch.groups * group_bytes / kBytesPerThread);
  const auto piece = [&](int64_t begin, int64_t end, Arena* arena) {
    RewardGroup<T> group(*kernels, args.dtype, candidates, args.dim, arena);
    for (int64_t i = begin; i < end; ++i) {
      const GroupIndex index(args.batch, i);
      group.bind({group_data<T>(args.batch, args.query, index), args.query.stride},
                 {group_data<T>(args.batch, args.positive, index), args.positive.stride},
                 negatives_of<T>(args, index));
      if (i + 1 < end) {
        const GroupIndex next(args.batch, i + 1);
        group.look_ahead(group_data<T>(args.batch, args.positive, next),
                         negatives_of<T>(args, next));
      }
      body(i, index, &group);
    }
  };
  return for_pieces(args.batch.groups, std::max<int64_t>(1, (64 << 10) / group_bytes),
                    static_cast<int>(threads), RewardGroup<T>::arena_bytes(candidates, args.dim),
                    piece);
}

template <class V>
double upstream_of(const ElvaRewardArgs& args, const GroupIndex& index) {
  const V* upstream = group_data<V>(args.batch, args.upstream, index);
  return upstream == nullptr ? 1.0 : static_cast<double>(*upstream);
}

// Writing past the caches wants whole, aligned lines and an output that the caches cannot hold.
template <class T>
bool streams(const ElvaRewardArgs& args) {
  const int64_t row_bytes = args.dim * static_cast<int64_t>(sizeof(T));
  const uintptr_t bases = reinterpret_cast<uintptr_t>(args.grad_positive) |
                          reinterpret_cast<uintptr_t>(args.grad_negative);
  return args.grad_negative != nullptr && row_bytes % 64 == 0 && bases % 64 == 0 &&
         args.batch.groups * args.negatives * row_bytes > kStreamBytes;
}

template <class T>
GradientRowsOut<T> outs_of(const ElvaRewardArgs& args, int64_t i) {
  const auto at = [i](void* base, int64_t size) {
    return base == nullptr ? nullptr : static_cast<T*>(base) + i * size;
  };
  return {at(args.grad_query, args.dim), at(args.grad_positive, args.dim),
          at(args.grad_negative, args.negatives * args.dim), streams<T>(args)};
}

template <class T>
ElvaStatus forward(const ElvaRewardArgs& args) {
  using V = typename ValueOf<T>::Type;
  const int64_t width = 2 * args.negatives + 3;
  const bool wants_gradients =
      args.grad_query != nullptr || args.grad_positive != nullptr || args.grad_negative != nullptr;
  return for_groups<T>(args, [&](int64_t i, const GroupIndex& index, RewardGroup<T>* group) {
    double* saved = args.coefficients;
    double* coefficients = saved == nullptr ? group->own_coefficients() : saved + i * width;
    group->set_mask(group_data<bool>(args.batch, args.mask, index), args.mask.stride);
    const V* relevance = static_cast<const V*>(args.relevance);
    group->set_relevance(relevance == nullptr ? nullptr : relevance + i * args.negatives);
    group->score(static_cast<V*>(args.scores) + i * (args.negatives + 1));
    const GroupReward out = group->rank(args.weights);
    static_cast<V*>(args.reward)[i] = static_cast<V>(out.reward);
    static_cast<V*>(args.margin_reward)[i] = static_cast<V>(out.margin_reward);
    static_cast<V*>(args.rank_reward)[i] = static_cast<V>(out.rank_reward);
    args.rank[i] = out.rank;
    if (saved != nullptr || wants_gradients) group->set_coefficients(args.weights, coefficients);
    if (wants_gradients) {
      group->gradients(coefficients, upstream_of<V>(args, index), true, outs_of<T>(args, i));
    }
  });
}

template <class T>
ElvaStatus backward(const ElvaRewardArgs& args) {
  using V = typename ValueOf<T>::Type;
  const int64_t width = 2 * args.negatives + 3;
  return for_groups<T>(args, [&](int64_t i, const GroupIndex& index, RewardGroup<T>* group) {
    group->gradients(args.coefficients + i * width, upstream_of<V>(args, index), false,
                     outs_of<T>(args, i));
  });
}

}  // namespace
}  // namespace elva

extern "C" {

ElvaStatus elva_reward_forward_cpu(const ElvaRewardArgs* args) {
  return elva::by_dtype(args->dtype,
                        [args](auto element) { return elva::forward<decltype(element)>(*args); });
}

ElvaStatus elva_reward_backward_cpu(const ElvaRewardArgs* args) {
  return elva::by_dtype(args->dtype,
                        [args](auto element) { return elva::backward<decltype(element)>(*args); });
}

}  // extern "C"
