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

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kSize = 8;  // elements of a thread at a time
constexpr int kHeld = 2;  // times
constexpr int64_t kHeldColumns = kHeld * kThreads * kSize;

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

// A row's pairs, in order.
class Pairs {
 public:
  __device__ Pairs(const ElvaCudaGradientArgs& args, int64_t i) : args_(args) {
    if (args.first != nullptr) {
      first = args.first[i];
      last = args.first[i + 1];
    } else {
      const int64_t each = args.target == nullptr ? 1 : args.positives, end = (i + 1) * each;
      first = i * each < args.pairs ? i * each : args.pairs;
      last = end < args.pairs ? end : args.pairs;
    }
  }

  __device__ int64_t pair(int64_t n) const { return args_.order == nullptr ? n : args_.order[n]; }
  // The row of the other side.
  __device__ int64_t other(int64_t pair) const {
    return args_.target == nullptr ? pair / args_.positives : args_.target[pair];
  }
  __device__ bool is_sound(int64_t other) const {
    return other >= 0 && other < args_.others_count && !isnan(args_.others_inverse[other]);
  }
  // Whether a query has a positive that is not finite.
  __device__ bool spoil() const {
    bool bad = false;
    for (int64_t n = first; args_.target != nullptr && n < last; ++n) {
      bad = bad || (args_.target[n] != -1 && !is_sound(args_.target[n]));
    }
    return bad;
  }

  int64_t first, last;

 private:
  const ElvaCudaGradientArgs& args_;
};

// A row's sums with its pairs' rows.
template <class X>
class Sums {
 public:
  __device__ Sums(const ElvaCudaGradientArgs& args, int64_t i, float inverse, int power)
      : args_(args),
        pairs_(args, i),
        row_(args.grad_unit + i * args.dim),
        inverse_(inverse),
        power_(power),
        vectors_(args.dim % kSize == 0) {}

  __device__ void at(int64_t at, float* sums) const {
    read(row_, at, args_.dim, vectors_, sums);
    for (int64_t n = pairs_.first; n < pairs_.last; ++n) {
      const int64_t pair = pairs_.pair(n), other = pairs_.other(pair);
      if (!pairs_.is_sound(other)) continue;
      const float slope =
          scalbnf(args_.target_slope[pair] * inverse_ * args_.others_inverse[other], power_);
      float x[kSize];
      read(static_cast<const X*>(args_.others) + other * args_.dim, at, args_.dim, vectors_, x);
#pragma unroll
      for (int e = 0; e < kSize; ++e) sums[e] = fmaf(slope, x[e], sums[e]);
    }
  }

 private:
  const ElvaCudaGradientArgs& args_;
  Pairs pairs_;
  const float* row_;
  float inverse_;
  int power_;
  bool vectors_;
};

// Of a block, on every thread.
__device__ inline float block_sum(float x, float* shared) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = shared[0];
  for (int w = 1; w < kWarps; ++w) sum += shared[w];
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

// With kHalf of rows in fp16, else in fp32.
template <class T, bool kHalf>
__global__ void __launch_bounds__(kThreads, 6)
    unit_gradient(const __grid_constant__ ElvaCudaGradientArgs args) {
  using X = std::conditional_t<kHalf, Fp16, float>;
  ELVA_DYNAMIC_SHARED(memory);
  const int64_t i = blockIdx.x, dim = args.dim;
  const X* unit = static_cast<const X*>(args.unit) + i * dim;
  T* out = static_cast<T*>(args.grad_rows) + i * dim;
  const bool vectors = dim % kSize == 0, held = dim <= kHeldColumns;
  const int64_t own = static_cast<int64_t>(threadIdx.x) * kSize, step = kThreads * kSize;
  const bool spoilt = Pairs(args, i).spoil();
  const float inverse = spoilt ? nanf("") : args.inverse[i];
  const int power = *args.power;
  const Sums<X> sums(args, i, inverse, power);
  float g[kHeld][kSize], x[kHeld][kSize], product = 0;
  if (held) {
#pragma unroll
    for (int v = 0; v < kHeld; ++v) {
      const int64_t at = own + v * step;
      if (at >= dim) continue;
      read(unit, at, dim, vectors, x[v]);
      sums.at(at, g[v]);
      product += dot(x[v], g[v]);
    }
  } else {
#pragma unroll 1
    for (int64_t at = own; at < dim; at += step) {
      read(unit, at, dim, vectors, x[0]);
      sums.at(at, g[0]);
      product += dot(x[0], g[0]);
    }
  }
  product = block_sum(product, reinterpret_cast<float*>(memory));
  const Gradient gradient(product * inverse * inverse, -power - args.exponent[i]);
  if (held) {
#pragma unroll
    for (int v = 0; v < kHeld; ++v) {
      const int64_t at = own + v * step;
      if (at >= dim) continue;
      gradient.apply(x[v], g[v]);
      write(out, at, dim, vectors, g[v]);
    }
  } else {
#pragma unroll 1
    for (int64_t at = own; at < dim; at += step) {
      read(unit, at, dim, vectors, x[0]);
      sums.at(at, g[0]);
      gradient.apply(x[0], g[0]);
      write(out, at, dim, vectors, g[0]);
    }
  }
}

template <class T, bool kHalf>
ElvaStatus run(const ElvaCudaGradientArgs& args) {
  return launch(unit_gradient<T, kHalf>, args.count, 1, kThreads, kWarps * sizeof(float),
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
