// What: the grouped ranking reward on any GPU from sm_80 on, and its gradients from what the
//   forward saved.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; cosine (1), rank (2), margin reward (3),
//   rank reward (4), reward (5), soft rank (6) of elva_kernels.reference.
// In: query, positive [*, D], negatives [*, N, D] in bf16, fp16 or fp32, any strides and any
//   alignment (dense rows on 16 bytes are read in vectors); mask [*, N]. Or a bank [M, D] and index
//   [*, N], the rows of it that are a group's negatives.
// Out: reward, margin_reward, rank_reward [*], scores [*, N + 1] in fp32, rank int32 [*];
//   coefficients (reward_group.h); gradients dense, those that are wanted (a bank's: reward_bank.cu).
// Work split: forward a block a group, a warp two candidates; backward a block for some columns of a
//   group (reward_gradient.h).
// Bytes: the forward reads each input once; the backward reads it once, if a gradient that is wanted
//   takes it, and writes each gradient once.
// Numerics: float sums of segments added in double (rows.h); rows out of range scaled by a power of
//   two; ranks by compare-and-count on integers; gradients by two float products where their
//   coefficients are in range, else in double. No atomics: the same bits on every run, a group's
//   from that group alone.
// Limits: none; beyond 2,000 candidates a group's ranks lie in global memory.
// Reference: elva_kernels.reference.ranking_reward.
#include "reward_cluster.h"

namespace elva {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr size_t kMostShared = 96 << 10;  // what every GPU from sm_80 on has

struct PlainArgs {
  ElvaRewardArgs reward;
  int64_t columns;  // of a segment
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    reward_forward(const __grid_constant__ PlainArgs all) {
  ELVA_DYNAMIC_SHARED(memory);
  const ElvaRewardArgs& args = all.reward;
  const int64_t index = blockIdx.x, candidates = args.negatives + 1;
  unsigned char* own = memory;
  if (args.scratch != nullptr) {
    own = static_cast<unsigned char*>(args.scratch) +
          static_cast<size_t>(index) * Group::bytes(candidates);
  }
  const Group group(own, candidates);
  Row<T> query{group_data<T>(args.batch, args.query, index), args.query.stride, 0};
  const Candidates<T> rows(args, index);
  const bool whole = query.is_dense() && args.dim % Vector<T>::kSize == 0;
  // By every warp for itself.
  const double square = whole ? pair_row_sums(query, query, query, args.dim, all.columns).y
                              : row_sums(query, query, args.dim, all.columns).y;
  const double query_norm = norm_of(&query, square, args.dim, all.columns);
  const auto one = [&](int64_t c) {
    const int64_t place = rows.place(c);
    double2 sums{0, 0};
    double norm = place == kNowhere ? nan("") : 0, true_norm = norm;
    if (place >= 0) {
      Row<T> row = rows.at(c, place);
      sums = row_sums(row, query, args.dim, all.columns);
      norm = norm_of(&row, sums.y, args.dim, all.columns);
      if (row.exponent != 0) sums = row_sums(row, query, args.dim, all.columns);
      true_norm = scalbn(norm, row.exponent);
    }
    if (threadIdx.x % 32 == 0) {
      group.set(c, place != kMasked, sums.x, query_norm, norm, true_norm);
    }
  };
  for (int64_t c = threadIdx.x / 32; c < candidates; c += 2 * kWarps) {
    const int64_t next = c + kWarps;
    if (next >= candidates) {
      one(c);
      continue;
    }
    const int64_t place = rows.place(c), next_place = rows.place(next);
    const bool both = whole && query.exponent == 0 && place >= 0 && next_place >= 0 &&
                      rows.at(c, place).is_dense() && rows.at(next, next_place).is_dense();
    double2 sums{0, 0};
    if (both) {
      sums =
          pair_row_sums(rows.at(c, place), rows.at(next, next_place), query, args.dim, all.columns);
    }
    if (!both || warp_sum(is_in_range(sums.y) ? 0 : 1) > 0) {
      one(c);
      one(next);
    } else if (threadIdx.x % 32 == 0 || threadIdx.x % 32 == kOfSecond) {
      const double norm = sqrt(sums.y);
      group.set(threadIdx.x % 32 == 0 ? c : next, true, sums.x, query_norm, norm, norm);
    }
  }
  __syncthreads();
  rank_group(group, candidates, args.weights);
  __syncthreads();
  if (threadIdx.x < 32) total_group(group, candidates, args.weights);
  __syncthreads();
  write_group(args, index, group);
  if (args.coefficients == nullptr) return;
  double* a = args.coefficients + index * (2 * candidates + 1);
  const double true_norm = scalbn(query_norm, query.exponent);
  set_coefficients(group, candidates, true_norm, args.weights, a, a + candidates);
  __syncthreads();  // orders a block's own writes to global memory too
  if (threadIdx.x < 32) {
    total_query(group, candidates, true_norm, a + candidates);
    if (threadIdx.x == 0) a[2 * candidates] = group.total[Group::kQuery];
  }
}

// Blocks of columns of a group.
template <class T>
__host__ __device__ inline int64_t column_blocks(int64_t dim) {
  constexpr int64_t kColumns = int64_t{kWide} * Vector<T>::kSize;
  return (dim + kColumns - 1) / kColumns;
}

// kWhole: has_whole_rows.
template <class T, bool kWhole>
__global__ void __launch_bounds__(kGradientThreads, 2)
    reward_backward(const __grid_constant__ ElvaRewardArgs args) {
  constexpr int kSize = Vector<T>::kSize;
  ELVA_DYNAMIC_SHARED(memory);
  const int64_t blocks = column_blocks<T>(args.dim), candidates = args.negatives + 1;
  const int64_t index = blockIdx.x / blocks;
  const int64_t at = (blockIdx.x % blocks * kWide + threadIdx.x % kWide) * kSize;
  const double* a = args.coefficients + index * (2 * candidates + 1);
  const double query_b = a[2 * candidates], upstream = upstream_of(args, index);
  const Wanted wanted(args);
  const auto out = [&](int64_t c) {
    T* const rows = static_cast<T*>(c > 0   ? args.grad_negative
                                    : c < 0 ? args.grad_query
                                            : args.grad_positive);
    return rows + (c > 0 ? index * args.negatives + c - 1 : index) * args.dim + at;
  };
  const Row<T> query{group_data<T>(args.batch, args.query, index), args.query.stride, 0};
  const Candidates<T> rows(args, index);
  // Of what lies nowhere another one: its coefficients are NaN, and so are they by any row.
  const auto row = [&](int64_t c) -> Row<T> {
    if (c < 0) return query;
    const int64_t place = rows.in_bank ? rows.place(c) : c - 1;
    return c > 0 && place < 0 ? rows.at(0, 0) : rows.at(c, place);
  };
  const auto read = [&](int64_t c) {
    if constexpr (kWhole) return load16(row(c).data + at);
    return row(c).packed(at, args.dim, row(c).is_dense());
  };
  const auto write = [&](int64_t c, const auto* gradient) {
    if (!wanted.of(c)) return;
    const Vector<T> x = packed<T>(gradient);
    T* const p = out(c);
    if constexpr (kWhole) {
      store16(p, x);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (at + i < args.dim) p[i] = x.at[i];
    }
  };
  gradient_columns<T, kWhole ? 4 : 1, true>(wanted.count(candidates), a, a + candidates, query_b,
                                            upstream, at < args.dim, memory, read, write);
}

template <class T>
ElvaStatus backward(const ElvaRewardArgs& args) {
  const int64_t blocks = args.batch.groups * column_blocks<T>(args.dim);
  const auto kernel =
      has_whole_rows<T>(args) ? reward_backward<T, true> : reward_backward<T, false>;
  return launch(kernel, blocks, 1, kGradientThreads, kGradientShared, args.stream, args);
}

template <class T>
ElvaStatus forward(const ElvaRewardArgs& args) {
  const Split split = split_of<T>(args.negatives + 1, args.dim);
  const bool wanted = Wanted(args).any();
  if (wanted && split.blocks > 0) {
    const ElvaStatus status = cluster_reward<T>(args, split);
    if (status != ELVA_UNSUPPORTED) return status;
  }
  const size_t bytes = args.scratch == nullptr ? Group::bytes(args.negatives + 1) : 0;
  const ElvaStatus status = launch(reward_forward<T>, args.batch.groups, 1, kThreads, bytes,
                                   args.stream, PlainArgs{args, split.columns});
  return status != ELVA_OK || !wanted ? status : backward<T>(args);
}

}  // namespace
}  // namespace elva

extern "C" {

int64_t elva_reward_scratch_bytes_cuda(int64_t groups, int64_t negatives) {
  const size_t bytes = elva::Group::bytes(negatives + 1);
  return bytes <= elva::kMostShared ? 0 : groups * static_cast<int64_t>(bytes);
}

ElvaStatus elva_reward_forward_cuda(const ElvaRewardArgs* args) {
  return elva::on_device(args->dtype, args->device,
                         [args](auto element) { return elva::forward<decltype(element)>(*args); });
}

ElvaStatus elva_reward_backward_cuda(const ElvaRewardArgs* args) {
  return elva::on_device(args->dtype, args->device,
                         [args](auto element) { return elva::backward<decltype(element)>(*args); });
}

}  // extern "C"
