// What: the grouped ranking reward on a GPU, a plain portable kernel (sm_80 and later). It has been
// compiled and not
//   yet run on a GPU, so no dispatch knows it: it proves the build and is where the tuned kernels
//   start from.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; eq. (1) to (5) of
// elva_kernels/reference.py. In: query, positive [*, D], negatives [*, N, D] in bf16, fp16, fp32 or
// fp64, any strides; mask [*, N]. Out: reward, margin_reward, rank_reward [*], scores [*, N + 1] in
// fp32 (fp64), rank int32 [*]; gradients dense. Work split: one block a group. Forward: a warp a
// candidate. Backward: a thread a column, all candidates in order. Bytes: forward reads each input
// once, backward once more and writes each gradient once: 1.5 times the floor. Numerics: 4 float
// sums a lane, at most 8 terms in each before they are added in double; rows out of range are
// scaled
//   by a power of two first; ranks by compare-and-count on integers. No atomics: deterministic.
// Limits: integer ranks; 1,000 candidates a group (shared memory); fp64 rows with norms from 1e-150
// to 1e150 in the gradient. Reference: elva_kernels.reference.ranking_reward.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../elva.h"
#include "../rank_math.h"

namespace elva {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMaxCandidates = 1000;

template <class T>
struct ValueOf {
  using Type = float;
};
template <>
struct ValueOf<double> {
  using Type = double;
};

__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widened(__half x) { return __half2float(x); }
__device__ inline float widened(float x) { return x; }
__device__ inline double widened(double x) { return x; }

__device__ inline void narrow(double x, __nv_bfloat16* out) { *out = __double2bfloat16(x); }
__device__ inline void narrow(double x, __half* out) { *out = __double2half(x); }
__device__ inline void narrow(double x, float* out) { *out = static_cast<float>(x); }
__device__ inline void narrow(double x, double* out) { *out = x; }

template <class T>
__device__ const T* group_data(const ElvaBatch& batch, const ElvaInput& input, int64_t group) {
  int64_t offset = 0;
  for (int32_t i = batch.ndim - 1; i >= 0; --i) {
    offset += group % batch.sizes[i] * input.batch_strides[i];
    group /= batch.sizes[i];
  }
  return static_cast<const T*>(input.data) + offset;
}

// A row in the caller's memory, read as value * 2^-exponent.
template <class T>
struct Row {
  const T* data;
  int64_t stride;
  int exponent;

  __device__ typename ValueOf<T>::Type operator[](int64_t i) const {
    const auto x = widened(data[i * stride]);
    return exponent == 0 ? x : scalbn(x, -exponent);
  }
};

template <class T>
__device__ Row<T> candidate_row(const ElvaRewardArgs& args, int64_t group, int64_t candidate) {
  if (candidate == 0) {
    return {group_data<T>(args.batch, args.positive, group), args.positive.stride, 0};
  }
  const T* negatives = group_data<T>(args.batch, args.negative, group);
  return {negatives + (candidate - 1) * args.negative.row_stride, args.negative.stride, 0};
}

// The sum of a warp's values, on every lane, in an order of its own.
__device__ inline double warp_sum(double x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// left . right over the lanes of a warp.
template <class T>
__device__ double warp_dot(const Row<T>& left, const Row<T>& right, int64_t dim) {
  using V = typename ValueOf<T>::Type;
  double sum = 0;
  for (int64_t block = threadIdx.x % 32; block < dim; block += 32 * 32) {
    V parts[4] = {};
#pragma unroll 1
    for (int step = 0; step < 8; ++step) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int64_t i = block + 32 * (4 * step + part);
        if (i < dim) parts[part] += left[i] * right[i];
      }
    }
    sum += (static_cast<double>(parts[0]) + parts[1]) + (static_cast<double>(parts[2]) + parts[3]);
  }
  return warp_sum(sum);
}

// The row's norm; sets its exponent where the square is out of the range that keeps products exact
// to a power of two. NaN for a row that is not finite.
template <class T>
__device__ double warp_norm(Row<T>* row, int64_t dim) {
  double square = warp_dot(*row, *row, dim);
  if (square >= 0x1p-20 && square <= 0x1p60) return sqrt(square);
  double largest = 0;
  for (int64_t i = threadIdx.x % 32; i < dim; i += 32) {
    const double magnitude = fabs(static_cast<double>((*row)[i]));
    if (!(magnitude <= largest)) largest = magnitude;  // takes NaN
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    const double other = __shfl_xor_sync(0xffffffffu, largest, offset);
    if (!(other <= largest) && !isnan(largest)) largest = other;
  }
  if (largest == 0) return 0;
  if (!isfinite(largest)) return nan("");
  row->exponent = ilogb(largest);
  return sqrt(warp_dot(*row, *row, dim));
}

// A group's state in shared memory.
template <class V>
struct Shared {
  typename RankKey<V>::Type* keys;
  double* score;  // before clamping; NaN where not finite
  double* norm;   // 2^-exponent |row|, 0 for a zero row
  double* slope;
  int* exponent;
  int* rank;
  bool* live;

  __device__ Shared(unsigned char* memory, int64_t candidates) {
    keys = reinterpret_cast<typename RankKey<V>::Type*>(memory);
    score = reinterpret_cast<double*>(keys + candidates);
    norm = score + candidates;
    slope = norm + candidates;
    exponent = reinterpret_cast<int*>(slope + candidates);
    rank = exponent + candidates;
    live = reinterpret_cast<bool*>(rank + candidates);
  }
  static constexpr size_t kBytes =
      sizeof(typename RankKey<V>::Type) + 3 * sizeof(double) + 2 * sizeof(int) + 1;
};

// Eq. (1): a warp a candidate.
template <class T>
__device__ void score_candidates(const ElvaRewardArgs& args, int64_t group, const Row<T>& query,
                                 double query_norm,
                                 const Shared<typename ValueOf<T>::Type>& shared) {
  using V = typename ValueOf<T>::Type;
  const bool* mask =
      args.mask.data == nullptr ? nullptr : group_data<bool>(args.batch, args.mask, group);
  V* scores = static_cast<V*>(args.scores) + group * (args.negatives + 1);
  for (int64_t c = threadIdx.x / 32; c <= args.negatives; c += kWarps) {
    const bool live = c == 0 || mask == nullptr || mask[(c - 1) * args.mask.stride];
    double score = 0, norm = 0;
    Row<T> row = candidate_row<T>(args, group, c);
    if (live) {
      norm = warp_norm(&row, args.dim);
      if (isnan(norm) || isnan(query_norm)) {
        score = nan("");
      } else if (norm > 0 && query_norm > 0) {
        score = warp_dot(row, query, args.dim) / (query_norm * norm);
      }
    }
    if (threadIdx.x % 32 == 0) {
      const V clamped = static_cast<V>(score > 1 ? 1.0 : score < -1 ? -1.0 : score);
      scores[c] = live ? clamped : static_cast<V>(-INFINITY);
      shared.keys[c] = rank_key<V>(clamped, static_cast<uint32_t>(c));
      shared.score[c] = score;
      shared.norm[c] = norm;
      shared.exponent[c] = row.exponent;
      shared.live[c] = live;
    }
  }
}

// Eq. (3) to (5), on one thread; the order of the sums is that of the candidates.
template <class V>
__device__ void reduce_group(const ElvaRewardArgs& args, int64_t group, const Shared<V>& shared) {
  const V* scores = static_cast<const V*>(args.scores) + group * (args.negatives + 1);
  const int hardest_rank = shared.rank[0] == 1 ? 2 : 1;
  double rank_reward = 0, margin_reward = 0;
  int64_t hardest = 0;
  bool sound = true;
  for (int64_t c = 0; c <= args.negatives; ++c) {
    if (!shared.live[c]) continue;
    const double weight =
        rank_weight(c == 0, log(static_cast<double>(shared.rank[c])), args.weights.rank_penalty);
    rank_reward += weight * scores[c];
    shared.slope[c] = args.weights.w_rank * weight;
    sound = sound && isfinite(scores[c]);
    if (shared.rank[c] == hardest_rank) hardest = c;
  }
  if (hardest > 0) margin_reward = margin_hinge(scores[0], scores[hardest], args.weights.margin);
  if (margin_reward > 0) {
    shared.slope[0] += args.weights.w_margin;
    shared.slope[hardest] -= args.weights.w_margin;
  }
  if (!sound) {
    rank_reward = margin_reward = nan("");
    for (int64_t c = 0; c <= args.negatives; ++c) shared.slope[c] = nan("");
  }
  static_cast<V*>(args.margin_reward)[group] = static_cast<V>(margin_reward);
  static_cast<V*>(args.rank_reward)[group] = static_cast<V>(rank_reward);
  const double reward = args.weights.w_margin * margin_reward + args.weights.w_rank * rank_reward;
  static_cast<V*>(args.reward)[group] = static_cast<V>(reward);
  args.rank[group] = shared.rank[0];
}

// a[C], b[C] and the query's b, in true units: gradient row = a q + b c, gradient of the query =
// sum a c + b q.
template <class V>
__device__ void write_coefficients(const ElvaRewardArgs& args, int64_t group, double query_norm,
                                   const Shared<V>& shared) {
  const int64_t candidates = args.negatives + 1;
  double* a = args.coefficients + group * (2 * candidates + 1);
  double query_b = 0;
  for (int64_t c = 0; c < candidates; ++c) {
    const double norm = scalbn(shared.norm[c], shared.exponent[c]), slope = shared.slope[c];
    const bool counts = shared.live[c] && (isnan(slope) || (norm > 0 && query_norm > 0));
    a[c] = counts ? slope / (query_norm * norm) : 0;
    a[candidates + c] = counts ? -slope * shared.score[c] / (norm * norm) : 0;
    if (counts && isnan(slope)) a[c] = a[candidates + c] = slope;
    if (counts) query_b -= slope * shared.score[c];
  }
  a[2 * candidates] = query_norm == 0 ? query_b : query_b / (query_norm * query_norm);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    reward_forward(const __grid_constant__ ElvaRewardArgs args) {
  using V = typename ValueOf<T>::Type;
  extern __shared__ __align__(16) unsigned char memory[];
  const Shared<V> shared(memory, args.negatives + 1);
  const int64_t group = blockIdx.x;
  Row<T> query{group_data<T>(args.batch, args.query, group), args.query.stride, 0};
  const double query_norm = warp_norm(&query, args.dim);  // by every warp for itself
  score_candidates<T>(args, group, query, query_norm, shared);
  __syncthreads();
  for (int64_t c = threadIdx.x; c <= args.negatives; c += kThreads) {
    int rank = 1;
    for (int64_t other = 0; other <= args.negatives; ++other) {
      rank += shared.live[other] && shared.keys[other] > shared.keys[c];
    }
    shared.rank[c] = rank;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    reduce_group<V>(args, group, shared);
    if (args.coefficients != nullptr) {
      write_coefficients<V>(args, group, scalbn(query_norm, query.exponent), shared);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    reward_backward(const __grid_constant__ ElvaRewardArgs args) {
  using V = typename ValueOf<T>::Type;
  const int64_t group = blockIdx.x, candidates = args.negatives + 1;
  const double* a = args.coefficients + group * (2 * candidates + 1);
  const double* b = a + candidates;
  const double upstream =
      args.upstream.data == nullptr
          ? 1.0
          : static_cast<double>(*group_data<V>(args.batch, args.upstream, group));
  const T* query = group_data<T>(args.batch, args.query, group);
  for (int64_t i = threadIdx.x; i < args.dim; i += kThreads) {
    const double q = widened(query[i * args.query.stride]);
    double sum = 0;
    for (int64_t c = 0; c < candidates; ++c) {
      double gradient = 0;
      if (a[c] != 0 || b[c] != 0) {  // else masked: not read
        const double x = candidate_row<T>(args, group, c)[i];
        gradient = upstream * (a[c] * q + b[c] * x);
        sum += a[c] * x;
      }
      T* out = c == 0 ? static_cast<T*>(args.grad_positive) + group * args.dim
                      : static_cast<T*>(args.grad_negative) +
                            (group * args.negatives + c - 1) * args.dim;
      narrow(gradient, out + i);
    }
    narrow(upstream * (sum + a[2 * candidates] * q),
           static_cast<T*>(args.grad_query) + group * args.dim + i);
  }
}

ElvaStatus status_of_launch() {
  return cudaGetLastError() == cudaSuccess ? ELVA_OK : ELVA_DEVICE_ERROR;
}

template <class T>
ElvaStatus backward(const ElvaRewardArgs& args) {
  if (args.batch.groups == 0) return ELVA_OK;
  const auto stream = static_cast<cudaStream_t>(args.stream);
  reward_backward<T><<<static_cast<unsigned>(args.batch.groups), kThreads, 0, stream>>>(args);
  return status_of_launch();
}

template <class T>
ElvaStatus forward(const ElvaRewardArgs& args) {
  if (args.negatives >= kMaxCandidates || args.weights.rank_temperature > 0) {
    return ELVA_UNSUPPORTED;
  }
  if (args.batch.groups == 0) return ELVA_OK;
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const size_t bytes =
      Shared<typename ValueOf<T>::Type>::kBytes * static_cast<size_t>(args.negatives + 1);
  reward_forward<T><<<static_cast<unsigned>(args.batch.groups), kThreads, bytes, stream>>>(args);
  const ElvaStatus status = status_of_launch();
  return status != ELVA_OK || args.grad_query == nullptr ? status : backward<T>(args);
}

}  // namespace
}  // namespace elva

extern "C" {

ElvaStatus elva_reward_forward_cuda(const ElvaRewardArgs* args) {
  switch (args->dtype) {
    case ELVA_BF16:
      return elva::forward<__nv_bfloat16>(*args);
    case ELVA_FP16:
      return elva::forward<__half>(*args);
    case ELVA_FP32:
      return elva::forward<float>(*args);
    default:
      return elva::forward<double>(*args);
  }
}

ElvaStatus elva_reward_backward_cuda(const ElvaRewardArgs* args) {
  switch (args->dtype) {
    case ELVA_BF16:
      return elva::backward<__nv_bfloat16>(*args);
    case ELVA_FP16:
      return elva::backward<__half>(*args);
    case ELVA_FP32:
      return elva::backward<float>(*args);
    default:
      return elva::backward<double>(*args);
  }
}

}  // extern "C"
