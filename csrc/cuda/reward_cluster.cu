// What: the grouped ranking reward, with its gradients where they are wanted, each group read once
//   and held in the shared memory of a cluster of blocks (sm_90 and later).
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; cosine (1), rank (2), margin reward (3),
//   rank reward (4), reward (5), soft rank (6), with a relevance (3g, 4g) of elva_kernels.reference.
// In: as reward.cu, rows dense and on 16 bytes.
// Out: as reward.cu.
// Work split: a cluster a group, over and over; a block some columns of all of the group's rows, so
//   that every gradient is its own; a warp four rows, then reward_gradient.h. Blocks send each other
//   a product and a square a row through distributed shared memory; each block ranks for itself.
// Bytes: each input read once by bulk copies, one a group, or a row where some are left out or named
//   by an index; each gradient that is wanted written once: 2 (N + 2) D elements a group, the floor.
// Numerics: as reward.cu, to the last bit. No atomics: the same bits on every run.
// Limits: a group of (N + 2) D elements in 8 times 227 KB.
// Reference: elva_kernels.reference.ranking_reward_and_grad.
#include "reward_block.h"
#include "reward_cluster.h"

namespace elva {
namespace {

constexpr int kThreads = kGradientThreads;
constexpr int kMostBlocks = 8;
constexpr size_t kMostShared = 227 << 10;
constexpr size_t kHalfShared = 113 << 10;  // two blocks a multiprocessor: one loads, one computes
constexpr int64_t kLongSegment = 2048;     // where no block decides

int64_t rounded_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

template <class T, bool kSoft, bool kGraded>
__global__ void __launch_bounds__(kThreads, 2)
    reward_clusters(const __grid_constant__ ClusterArgs args) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  ELVA_DYNAMIC_SHARED(memory);
  Block<T, kSoft, kGraded> block(args, memory);
  block.open();
  for (int64_t index = blockIdx.x / args.blocks; index < args.reward.batch.groups;
       index += args.clusters) {
    block.run(index);
  }
  block.close();
#endif
}

template <class T, bool kGraded>
auto kernel_of(const ElvaRewardWeights& weights) {
  return weights.rank_temperature > 0 ? reward_clusters<T, true, kGraded>
                                      : reward_clusters<T, false, kGraded>;
}

// Whether a group's negatives lie side by side, all of them to be read.
template <class T>
bool describe_negatives(const ElvaRewardArgs& args, int64_t columns, RowBoxes* boxes) {
  constexpr int64_t kBytes = sizeof(T), kBoxAlignment = 128;
  const bool is_aligned = 2 * columns * kBytes % kBoxAlignment == 0;  // behind two rows
  if (args.mask.data != nullptr || args.index.data != nullptr || args.batch.ndim > 1 ||
      args.negatives == 0 || !is_aligned || args.batch.groups > INT32_MAX) {
    return false;
  }
  const int64_t row = args.negative.row_stride * kBytes;
  const int64_t group =
      args.batch.ndim == 1 ? args.negative.batch_strides[0] * kBytes : args.negatives * row;
  return describe_boxes(boxes, args.negative.data, args.dim * kBytes / 4, args.negatives, row,
                        args.batch.groups, group, columns * kBytes / 4);
}

}  // namespace

template <class T>
Split split_of(int64_t candidates, int64_t dim) {
  for (int blocks : {1, 2, 4, kMostBlocks}) {
    const int64_t columns = rounded_up((dim + blocks - 1) / blocks, Vector<T>::kSize);
    const size_t most = blocks == kMostBlocks ? kMostShared : kHalfShared;
    if (Layout<T>{candidates, columns, blocks}.bytes() <= most) return {columns, blocks};
  }
  return {kLongSegment, 0};
}

template <class T>
ElvaStatus cluster_reward(const ElvaRewardArgs& args, const Split& split) {
  if (args.batch.groups == 0) return ELVA_OK;
  if (!has_clusters() || !has_whole_rows<T>(args)) return ELVA_UNSUPPORTED;
  const auto kernel = args.relevance == nullptr ? kernel_of<T, false>(args.weights)
                                                : kernel_of<T, true>(args.weights);
  const size_t bytes = Layout<T>{args.negatives + 1, split.columns, split.blocks}.bytes();
  int clusters = 0;
  const ElvaStatus status = most_clusters(kernel, split.blocks, kThreads, bytes, &clusters);
  if (status != ELVA_OK) return status;
  if (clusters == 0) return ELVA_UNSUPPORTED;
  const int64_t some = clusters < args.batch.groups ? clusters : args.batch.groups;
  ClusterArgs all = {};
  all.reward = args;
  all.columns = split.columns;
  all.clusters = some;
  all.blocks = split.blocks;
  all.wide = wide_of(split.columns / Vector<T>::kSize);
  all.is_boxed = describe_negatives<T>(args, split.columns, &all.negatives);
  return launch(kernel, some * split.blocks, split.blocks, kThreads, bytes, args.stream, all);
}

template Split split_of<Bf16>(int64_t, int64_t);
template Split split_of<Fp16>(int64_t, int64_t);
template Split split_of<float>(int64_t, int64_t);
template ElvaStatus cluster_reward<Bf16>(const ElvaRewardArgs&, const Split&);
template ElvaStatus cluster_reward<Fp16>(const ElvaRewardArgs&, const Split&);
template ElvaStatus cluster_reward<float>(const ElvaRewardArgs&, const Split&);

}  // namespace elva
