// What: the grouped ranking reward on any GPU from sm_80 on, and its gradients from what the
//   forward saved.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; cosine (1), rank (2), margin reward (3),
//   rank reward (4), reward (5), soft rank (6), with a relevance (3g, 4g) of elva_kernels.reference.
// In: query, positive [*, D], negatives [*, N, D] in bf16, fp16 or fp32, any strides and any
//   alignment (dense rows on 16 bytes are read in vectors); mask [*, N]; relevance [*, N] in fp32,
//   dense. Or a bank [M, D] and index [*, N], the rows of it that are a group's negatives.
// Out: reward, margin_reward, rank_reward [*], scores [*, N + 1] in fp32, rank int32 [*];
//   coefficients (reward_group.h); gradients dense, those that are wanted (a bank's: reward_bank.cu).
// Work split: forward a block a group, a warp four candidates; backward a block for some columns of a
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

constexpr int kThreads = 256;
constexpr size_t kMostShared = 96 << 10;  // what every GPU from sm_80 on has

struct PlainArgs {
  ElvaRewardArgs reward;
  int64_t columns;  // of a segment
};

// A group's rows, its scores and norms, by half-warps.
template <class T>
class Scorer {
 public:
  __device__ Scorer(const PlainArgs& all, int64_t index, const Group& group)
      : candidates_(all.reward.negatives + 1),
        dim_(all.reward.dim),
        columns_(all.columns),
        group_(group),
        query_{group_data<T>(all.reward.batch, all.reward.query, index), all.reward.query.stride,
               0},
        rows_(all.reward, index),
        whole_(query_.is_dense() && dim_ % Vector<T>::kSize == 0) {
    // By every half-warp for itself.
    const double square = whole_ ? pair_row_sums(query_, query_, query_, dim_, columns_).y
                                 : row_sums(query_, query_, dim_, columns_).y;
    inverse_ = inverse_of(scaled_square(&query_, square, dim_, columns_));
  }

  // Of the query, in true units.
  __device__ double true_inverse() const { return scalbn(inverse_, -query_.exponent); }

  // Eq. (1) for every candidate; whether this thread's are finite.
  __device__ bool run() const {
    bool sound = true;
    for (int64_t first = 0; first < candidates_; first += 2 * kHalfWarps) {
      const int64_t c = first + threadIdx.x / kRowLanes, next = c + kHalfWarps;
      if (!pair(c, next, &sound)) {
        one(c, &sound);
        one(next, &sound);
      }
    }
    if (threadIdx.x == 0) group_.set_rest(candidates_);
    return sound;
  }

 private:
  static constexpr int64_t kHalfWarps = kThreads / kRowLanes;

  // kMasked beyond the last.
  __device__ int64_t place(int64_t c) const { return c < candidates_ ? rows_.place(c) : kMasked; }
  __device__ void set(int64_t c, bool live, double dot, double inverse, double true_inverse,
                      bool* sound) const {
    group_.set(c, live, dot, inverse_, inverse, true_inverse);
    *sound = *sound && !(live && isnan(group_.score[c]));
  }

  // Two rows in vectors; false where some of the warp's are not dense or out of range. All lanes of
  // a warp.
  __device__ bool pair(int64_t c, int64_t next, bool* sound) const {
    const int64_t place_one = place(c), place_two = place(next);
    const bool read = place_one >= 0 && place_two >= 0;
    const bool dense = whole_ && query_.exponent == 0 && read &&
                       rows_.at(c, place_one).is_dense() && rows_.at(next, place_two).is_dense();
    if (!__all_sync(kAllLanes, dense)) return false;
    const double2 sums =
        pair_row_sums(rows_.at(c, place_one), rows_.at(next, place_two), query_, dim_, columns_);
    if (!__all_sync(kAllLanes, is_in_range(sums.y))) return false;
    if (threadIdx.x % kOfSecond == 0) {
      const double inverse = inverse_of(sums.y);
      set((threadIdx.x & kOfSecond) == 0 ? c : next, true, sums.x, inverse, inverse, sound);
    }
    return true;
  }

  // A row as it lies; the query's in place of one that is not read. All lanes of a warp.
  __device__ void one(int64_t c, bool* sound) const {
    const int64_t at = place(c);
    Row<T> row = at >= 0 ? rows_.at(c, at) : query_;
    row.exponent = 0;
    const double square = row_sums(row, query_, dim_, columns_).y;
    double inverse = inverse_of(scaled_square(&row, square, dim_, columns_));
    const double dot = row_sums(row, query_, dim_, columns_).x;
    if (row_lane() != 0 || c >= candidates_) return;
    if (at < 0) inverse = at == kNowhere ? nan("") : 0;
    set(c, at != kMasked, at < 0 ? 0 : dot, inverse, scalbn(inverse, -row.exponent), sound);
  }

  int64_t candidates_, dim_, columns_;
  const Group& group_;
  Row<T> query_;
  Candidates<T> rows_;
  bool whole_;
  double inverse_;
};

template <class T, bool kSoft, bool kGraded>
__device__ inline void score_group(const PlainArgs& all, int64_t index, const Group& group) {
  const ElvaRewardArgs& args = all.reward;
  const int64_t candidates = args.negatives + 1;
  const Scorer<T> scorer(all, index, group);
  bool sound = __syncthreads_or(!scorer.run()) == 0;
  sound = rank_sound<kSoft, kGraded>(group, candidates, sound, args, index);
  write_scores(args, index, group);
  const double inverse = scorer.true_inverse();
  double* a = nullptr;
  if (args.coefficients != nullptr) {
    a = args.coefficients + index * (2 * candidates + 1);
    set_coefficients<kSoft, kGraded>(group, candidates, sound, inverse, args.weights, a,
                                     a + candidates);
    __syncthreads();
  }
  if (threadIdx.x >= 32) return;
  total_group<kGraded>(group, candidates, sound, inverse, args.weights);
  if (threadIdx.x != 0) return;
  write_rewards(args, index, group);
  if (a != nullptr) a[2 * candidates] = group.total[Group::kQuery];
}

template <class T, bool kGraded>
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
  if (args.weights.rank_temperature > 0) {
    score_group<T, true, kGraded>(all, index, group);
  } else {
    group.open(candidates);
    score_group<T, false, kGraded>(all, index, group);
  }
}

// Blocks of columns of a group.
template <class T>
__host__ __device__ inline int64_t column_blocks(int64_t dim) {
  constexpr int64_t kColumns = int64_t{kMostWide} * Vector<T>::kSize;
  return (dim + kColumns - 1) / kColumns;
}

// The columns of a group's rows at `at`, where they lie. kWhole: has_whole_rows.
template <class T, bool kWhole>
class RowsInPlace {
 public:
  __device__ RowsInPlace(const ElvaRewardArgs& args, int64_t index, int64_t at)
      : args_(args),
        at_(at),
        own_(index * args.dim + at),
        query_{group_data<T>(args.batch, args.query, index), args.query.stride, 0},
        rows_(args, index),
        grad_negatives_(static_cast<T*>(args.grad_negative) + index * args.negatives * args.dim +
                        at) {}

  __device__ int64_t negatives() const { return args_.negatives; }
  __device__ Vector<T> read_query() const { return read(query_); }
  __device__ Vector<T> read_positive() const { return read(rows_.at(0, 0)); }
  // Of what lies nowhere another one: its coefficients are NaN, and so are they by any row.
  __device__ Vector<T> read_negative(int64_t n, bool is_wanted) const {
    const int64_t place = !is_wanted ? -1 : rows_.in_bank ? rows_.place(n + 1) : n;
    return read(place < 0 ? query_ : rows_.at(n + 1, place));
  }
  template <class V>
  __device__ void write_query(const V* gradient) const {
    write(static_cast<T*>(args_.grad_query) + own_, gradient, args_.grad_query != nullptr);
  }
  template <class V>
  __device__ void write_positive(const V* gradient) const {
    write(static_cast<T*>(args_.grad_positive) + own_, gradient, args_.grad_positive != nullptr);
  }
  template <class V>
  __device__ void write_negative(int64_t n, const V* gradient) const {
    write(grad_negatives_ + n * args_.dim, gradient, args_.grad_negative != nullptr);
  }

 private:
  __device__ Vector<T> read(const Row<T>& row) const {
    if constexpr (kWhole) return load16(row.data + at_);
    return row.packed(at_, args_.dim, row.is_dense());
  }
  template <class V>
  __device__ void write(T* out, const V* gradient, bool is_wanted) const {
    if (!is_wanted) return;
    const Vector<T> x = packed<T>(gradient);
    if constexpr (kWhole) {
      store16(out, x);
    } else {
#pragma unroll
      for (int i = 0; i < Vector<T>::kSize; ++i)
        if (at_ + i < args_.dim) out[i] = x.at[i];
    }
  }

  const ElvaRewardArgs& args_;
  int64_t at_, own_;
  Row<T> query_;
  Candidates<T> rows_;
  T* grad_negatives_;
};

template <class T, bool kWhole>
__global__ void __launch_bounds__(kGradientThreads, 2)
    reward_backward(const __grid_constant__ ElvaRewardArgs args) {
  ELVA_DYNAMIC_SHARED(memory);
  constexpr int kSize = Vector<T>::kSize;
  const int64_t blocks = column_blocks<T>(args.dim), candidates = args.negatives + 1;
  const int64_t index = blockIdx.x / blocks, first = blockIdx.x % blocks * kMostWide;
  const double* a = args.coefficients + index * (2 * candidates + 1);
  const RowsInPlace<T, kWhole> rows(args, index, (first + threadIdx.x % kMostWide) * kSize);
  GradientColumns<T, kWhole ? kTogether : 1, true, RowsInPlace<T, kWhole>>(
      kMostWide, (args.dim + kSize - 1) / kSize - first, a, a + candidates,
      upstream_of(args, index), memory, rows)
      .run(Wanted(args).count(args.negatives), a + 2 * candidates, [] {});
}

template <class T>
ElvaStatus backward(const ElvaRewardArgs& args) {
  const int64_t blocks = args.batch.groups * column_blocks<T>(args.dim);
  const auto kernel =
      has_whole_rows<T>(args) ? reward_backward<T, true> : reward_backward<T, false>;
  return launch(kernel, blocks, 0, kGradientThreads, gradient_shared<T>(args.negatives, kMostWide),
                args.stream, args);
}

template <class T>
ElvaStatus forward(const ElvaRewardArgs& args) {
  const Split split = split_of<T>(args.negatives + 1, args.dim);
  if (split.blocks > 0) {
    const ElvaStatus status = cluster_reward<T>(args, split);
    if (status != ELVA_UNSUPPORTED) return status;
  }
  const size_t bytes = args.scratch == nullptr ? Group::bytes(args.negatives + 1) : 0;
  const auto kernel =
      args.relevance == nullptr ? reward_forward<T, false> : reward_forward<T, true>;
  const ElvaStatus status = launch(kernel, args.batch.groups, 0, kThreads, bytes, args.stream,
                                   PlainArgs{args, split.columns});
  return status != ELVA_OK || !Wanted(args).any() ? status : backward<T>(args);
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
