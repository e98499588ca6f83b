// What: gradients on rows of embeddings out of sums of the other side's rows times slopes, the
//   slopes of pairs added first.
// Source: cosine (8) of elva_kernels.reference; dx = (g - u (u . g)) / |x|, u = x / |x|.
// In: rows and inverse norms of both sides as unit_rows keeps them, sums [R, D] in fp32, the power
//   of two of their slopes, slopes of pairs fp32 and which pairs are a row's.
// Out: gradients [R, D] in bf16, fp16 or fp32.
// Work split: a block a row.
// Bytes: sums and rows once, twice where they do not fit the block's registers; a row of the other
//   side a pair; gradients once.
// Numerics: fp32, sums by lanes and trees; what scales a row's sums cancels against its norm; powers
//   of two in the end, rounded once. Pairs in order, no atomics: deterministic.
// Limits: none.
// Reference: elva_kernels.reference.gradients_of_slopes.
#include "../elva_in_batch_cuda.h"
#include "device.h"

namespace elva {
namespace {

constexpr int kMostThreads = 128;
constexpr int kSize = 8;   // elements of a thread at a time
constexpr int kTimes = 4;  // of a row that a block holds
constexpr int64_t kHeldColumns = kMostThreads * kTimes * kSize;

// Elements of the block's threads at a time.
__device__ inline int64_t step() { return int64_t{blockDim.x} * kSize; }

// kSize elements from `at`, zeros beyond `dim`; in vectors where rows are on 16 bytes.
template <class T>
__device__ inline void read(const T* row, int64_t at, int64_t dim, bool vectors, float* out) {
  constexpr int kEach = Vector<T>::kSize;
#pragma unroll
  for (int v = 0; v < kSize / kEach; ++v) {
    if (vectors) {
      const Vector<T> x = load16(row + at + kEach * v);
#pragma unroll
      for (int e = 0; e < kEach; ++e) out[kEach * v + e] = widen(x.at[e]);
    } else {
#pragma unroll
      for (int e = kEach * v; e < kEach * (v + 1); ++e) {
        out[e] = at + e < dim ? widen(row[at + e]) : 0.0f;
      }
    }
  }
}

template <class T>
__device__ inline void write(T* row, int64_t at, int64_t dim, bool vectors, const float* x) {
  constexpr int kEach = Vector<T>::kSize;
#pragma unroll
  for (int v = 0; v < kSize / kEach; ++v) {
    Vector<T> all;
#pragma unroll
    for (int e = 0; e < kEach; ++e) narrow(x[kEach * v + e], all.at + e);
    if (vectors) {
      store16(row + at + kEach * v, all);
    } else {
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        if (at + kEach * v + e < dim) row[at + kEach * v + e] = all.at[e];
      }
    }
  }
}

// The rows of queries, or of candidates.
template <class X>
struct Side {
  int64_t count;
  const X* unit;
  const float* inverse;
  const int32_t* exponent;
  const float* grad_unit;
  void* gradient;

  __device__ Side(const ElvaCudaGradientArgs& args, bool of_query)
      : count(of_query ? args.queries : args.candidates),
        unit(static_cast<const X*>(of_query ? args.query_unit : args.candidate_unit)),
        inverse(of_query ? args.query_inverse : args.candidate_inverse),
        exponent(of_query ? args.query_exponent : args.candidate_exponent),
        grad_unit(of_query ? args.grad_unit_query : args.grad_unit_candidate),
        gradient(of_query ? args.grad_query : args.grad_candidate) {}

  __device__ bool is_sound(int64_t i) const { return i >= 0 && i < count && !isnan(inverse[i]); }
};

// A row's pairs, in order, and the rows of the other side that they add.
template <class X>
class Pairs {
 public:
  __device__ Pairs(const ElvaCudaGradientArgs& args, bool of_query, int64_t i, float inverse)
      : args_(args),
        others_(args, !of_query),
        of_query_(of_query),
        scale_(static_cast<float>(scalbn(static_cast<double>(inverse), *args.power - kShift))) {
    const int64_t all = args.queries * args.positives;
    const bool listed = !of_query && args.first != nullptr;
    first_ = listed ? args.first[i] : of_query ? i * args.positives : i < all ? i : all;
    last_ = listed ? args.first[i + 1] : of_query ? first_ + args.positives : i < all ? i + 1 : all;
  }

  // Whether a query has a positive that is not finite.
  __device__ bool spoil() const {
    bool bad = false;
    for (int64_t n = first_; of_query_ && n < last_; ++n) {
      bad = bad || (args_.target[n] != -1 && !others_.is_sound(args_.target[n]));
    }
    return bad;
  }
  // add(slope, row) of each.
  template <class Add>
  __device__ void each(const Add& add) const {
#pragma unroll 1
    for (int64_t n = first_; n < last_; ++n) {
      const int64_t pair = of_query_ || args_.order == nullptr ? n : args_.order[n];
      const int64_t other = of_query_              ? args_.target[pair]
                            : args_.positives == 1 ? pair
                                                   : pair / args_.positives;
      if (!others_.is_sound(other)) continue;
      constexpr float kScale = 1 << kShift;
      add(args_.target_slope[pair] * scale_ * (others_.inverse[other] * kScale),
          others_.unit + other * args_.dim);
    }
  }

 private:
  static constexpr int kShift = 14;  // inverses times 2^14 are near 1

  const ElvaCudaGradientArgs& args_;
  Side<X> others_;
  bool of_query_;
  float scale_;
  int64_t first_, last_;
};

// Of a block, on every thread.
__device__ inline float block_sum(float x, float* shared) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = shared[0];
  for (unsigned w = 1; w < blockDim.x / 32; ++w) sum += shared[w];
  return sum;
}

__device__ inline float dot(const float* x, const float* y) {
  float sums[2] = {};
#pragma unroll
  for (int e = 0; e < kSize; ++e) sums[e % 2] = fmaf(x[e], y[e], sums[e % 2]);
  return sums[0] + sums[1];
}

// (sums - along x) 2^exponent, in two steps: the power itself may leave the range of a float.
struct Gradient {
  float along, first, second;

  __device__ Gradient(float along, int exponent)
      : along(along),
        first(scalbnf(1.0f, exponent / 2)),
        second(scalbnf(1.0f, exponent - exponent / 2)) {}
  __device__ void apply(const float* x, float* sums) const {
#pragma unroll
    for (int e = 0; e < kSize; ++e) sums[e] = fmaf(-along, x[e], sums[e]) * first * second;
  }
};

// A thread's kCount vectors of a row from `at`, every `step`, and of its sums with its pairs' rows.
template <class X, int kCount>
struct Part {
  float x[kCount][kSize], sums[kCount][kSize];

  // Of row i of a side.
  __device__ Part(const Side<X>& side, const Pairs<X>& pairs, int64_t i, int64_t dim, int64_t at,
                  bool vectors) {
    const auto each = [&](const auto& apply) {
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        if (at + v * step() < dim) apply(v, at + v * step());
      }
    };
    each([&](int v, int64_t here) {
      read(side.unit + i * dim, here, dim, vectors, x[v]);
      read(side.grad_unit + i * dim, here, dim, vectors, sums[v]);
    });
    pairs.each([&](float slope, const X* other) {
      each([&](int v, int64_t here) {
        float y[kSize];
        read(other, here, dim, vectors, y);
#pragma unroll
        for (int e = 0; e < kSize; ++e) sums[v][e] = fmaf(slope, y[e], sums[v][e]);
      });
    });
  }
};

// kHeld: the block holds the row, which is in whole vectors. kHalf: rows are in fp16, else fp32.
template <class T, bool kHalf, bool kHeld>
__device__ inline void unit_gradient_row(const ElvaCudaGradientArgs& args, float* shared) {
  using X = std::conditional_t<kHalf, Fp16, float>;
  using Mine = Part<X, kHeld ? kTimes : 1>;
  const int64_t queries = args.grad_query == nullptr ? 0 : args.queries, dim = args.dim;
  const bool of_query = blockIdx.x < queries;
  const int64_t i = of_query ? blockIdx.x : blockIdx.x - queries;
  const int64_t own = static_cast<int64_t>(threadIdx.x) * kSize;
  const bool vectors = kHeld || dim % kSize == 0;
  const Side<X> side(args, of_query);
  const Pairs<X> pairs(args, of_query, i, side.inverse[i]);
  const float inverse = pairs.spoil() ? nanf("") : side.inverse[i];
  T* out = static_cast<T*>(side.gradient) + i * dim;
  const auto gradient = [&](float product) {
    return Gradient(block_sum(product, shared) * inverse * inverse,
                    -*args.power - side.exponent[i]);
  };
  if constexpr (kHeld) {
    Mine part(side, pairs, i, dim, own, vectors);
    float product = 0;
#pragma unroll
    for (int v = 0; v < kTimes; ++v) {
      if (own + v * step() < dim) product += dot(part.x[v], part.sums[v]);
    }
    const Gradient finish = gradient(product);
#pragma unroll
    for (int v = 0; v < kTimes; ++v) {
      if (own + v * step() >= dim) continue;
      finish.apply(part.x[v], part.sums[v]);
      write(out, own + v * step(), dim, vectors, part.sums[v]);
    }
  } else {
    float product = 0;
#pragma unroll 1
    for (int64_t at = own; at < dim; at += step()) {
      const Mine part(side, pairs, i, dim, at, vectors);
      product += dot(part.x[0], part.sums[0]);
    }
    const Gradient finish = gradient(product);
#pragma unroll 1
    for (int64_t at = own; at < dim; at += step()) {
      Mine part(side, pairs, i, dim, at, vectors);
      finish.apply(part.x[0], part.sums[0]);
      write(out, at, dim, vectors, part.sums[0]);
    }
  }
}

template <class T, bool kHalf>
__global__ void __launch_bounds__(kMostThreads, 3)
    unit_gradient(const __grid_constant__ ElvaCudaGradientArgs args) {
  ELVA_DYNAMIC_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  if (args.dim % kSize == 0 && args.dim <= kHeldColumns) {
    unit_gradient_row<T, kHalf, true>(args, shared);
  } else {
    unit_gradient_row<T, kHalf, false>(args, shared);
  }
}

template <class T, bool kHalf>
ElvaStatus run(const ElvaCudaGradientArgs& args) {
  const int64_t warps = (args.dim + 32 * kTimes * kSize - 1) / (32 * kTimes * kSize);
  const int threads = static_cast<int>(warps < kMostThreads / 32 ? 32 * warps : kMostThreads);
  const int64_t rows = (args.grad_query == nullptr ? 0 : args.queries) +
                       (args.grad_candidate == nullptr ? 0 : args.candidates);
  return launch(unit_gradient<T, kHalf>, rows, 1, threads, kMostThreads / 32 * sizeof(float),
                args.stream, args);
}

}  // namespace
}  // namespace elva

extern "C" ElvaStatus elva_unit_gradient_cuda(const ElvaCudaGradientArgs* args) {
  using namespace elva;
  return on_device(args->dtype, args->device, [args](auto element) -> ElvaStatus {
    using T = decltype(element);
    if (args->is_half) return run<T, true>(*args);
    if constexpr (std::is_same_v<T, float>) {
      return run<T, false>(*args);
    } else {
      return ELVA_UNSUPPORTED;
    }
  });
}
