// What: rows of embeddings as the in-batch ops multiply them, and the inverses of their norms.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; cosine (8) of elva_kernels.reference.
// In: rows [R, D] in bf16, fp16 or fp32, any strides.
// Out: dense rows in fp16 (fp32 of fp32), times a power of two; inverse norms fp32, exponents int32.
// Work split: a warp a row.
// Bytes: a row once where it is dense and fits the warp's registers, else three times, mostly from
//   cache; written once.
// Numerics: a row's largest magnitude decides a power of two by which squares fit fp32; their sums
//   in fp32 of 8 vectors a lane, in double beyond; the norm decides the power that is kept. Of a
//   bf16 or fp16 row no bit is lost but of elements below 2^-28 of the norm. Deterministic.
// Limits: none.
// Reference: elva_kernels.reference.in_batch._sound_unit.
#include "../elva_in_batch_cuda.h"
#include "rows.h"
#include "words.h"

namespace elva {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kHeld = 8;           // vectors of a lane: of a row that is held, or of a sum in fp32
constexpr int kNormExponent = 14;  // of the rows that are kept

template <class T>
using Kept = std::conditional_t<std::is_same_v<T, float>, float, Fp16>;

// x 2^exponent in two steps: the power itself may leave the range of a float.
struct PowerOfTwo {
  float first, second;

  __device__ explicit PowerOfTwo(int exponent)
      : first(scalbnf(1.0f, exponent / 2)), second(scalbnf(1.0f, exponent - exponent / 2)) {}
  __device__ float operator()(float x) const { return x * first * second; }
};

// The lane's vectors of a row, in registers: at (32 v + lane) kSize, zeros beyond.
template <class T>
class HeldRow {
 public:
  static constexpr int64_t kColumns = int64_t{kHeld} * 32 * Vector<T>::kSize;

  __device__ HeldRow(const Row<T>& row, int64_t dim) : dim_(dim) {
#pragma unroll
    for (int v = 0; v < kHeld; ++v) {
      held_[v] = place(v) < dim ? words_at(row.data + place(v)) : Words{};
    }
  }
  // step(v, at, vector) of each.
  template <class Step>
  __device__ void each(const Step& step) const {
#pragma unroll
    for (int v = 0; v < kHeld; ++v) {
      if (place(v) < dim_) step(v, place(v), elements<T>(held_[v]));
    }
  }

 private:
  __device__ static int64_t place(int v) {
    return (v * 32 + static_cast<int64_t>(threadIdx.x % 32)) * Vector<T>::kSize;
  }

  int64_t dim_;
  Words held_[kHeld];
};

// The same from where they lie.
template <class T>
class FarRow {
 public:
  __device__ FarRow(const Row<T>& row, int64_t dim)
      : row_(row), dim_(dim), dense_(row.is_dense()) {}
  template <class Step>
  __device__ void each(const Step& step) const {
    constexpr int kSize = Vector<T>::kSize;
    int v = 0;
#pragma unroll 1
    for (int64_t at = static_cast<int64_t>(threadIdx.x % 32) * kSize; at < dim_; at += 32 * kSize) {
      step(v++, at, row_.packed(at, dim_, dense_));
    }
  }

 private:
  Row<T> row_;
  int64_t dim_;
  bool dense_;
};

template <class T, class Source>
__device__ inline float largest_of(const Source& row) {
  float largest = 0;
  row.each([&](int, int64_t, const Vector<T>& x) {
#pragma unroll
    for (int e = 0; e < Vector<T>::kSize; ++e) {
      largest = fmaxf(largest, magnitude_of(widen(x.at[e])));
    }
  });
  return warp_max(largest);
}

// The sum of squares of a row times a power of two.
template <class T, class Source>
__device__ inline double square_of(const Source& row, const PowerOfTwo& scaled) {
  float squares[4] = {};
  double sum = 0;
  const auto flush = [&] {
    sum += (squares[0] + squares[1]) + (squares[2] + squares[3]);
#pragma unroll
    for (float& square : squares) square = 0;
  };
  row.each([&](int v, int64_t, const Vector<T>& x) {
    if (v % kHeld == 0 && v > 0) flush();
#pragma unroll
    for (int e = 0; e < Vector<T>::kSize; ++e) {
      const float value = scaled(widen(x.at[e]));
      squares[e % 4] = fmaf(value, value, squares[e % 4]);
    }
  });
  flush();
  return warp_sum(sum);
}

template <class T>
__device__ inline void put(Kept<T>* out, int64_t at, int64_t dim, const Kept<T>* x) {
  constexpr int kSize = Vector<T>::kSize;
  if (dim % kSize == 0) {
    Vector<Kept<T>> all;
#pragma unroll
    for (int e = 0; e < kSize; ++e) all.at[e] = x[e];
    store16(out + at, all);
  } else {
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      if (at + e < dim) out[at + e] = x[e];
    }
  }
}

constexpr int64_t kPadding = 16;  // inverses come in as many as a multiple of this; 0 behind all

// One side's rows, and where they are kept.
template <class T>
struct Side {
  const ElvaInput& rows;
  int64_t count;
  Kept<T>* unit;
  float* inverse;
  int32_t* exponent;
};

template <class T, class Source>
__device__ inline void unit_row(const Side<T>& side, int64_t i, int64_t dim, const Source& row) {
  constexpr int kSize = Vector<T>::kSize;
  const int largest = exponent_of(largest_of<T>(row));
  const bool usual = largest != kZero && largest != kNotFinite;
  double inverse = largest == kZero ? 0 : nan("");
  int exponent = 0;
  if (usual) {  // of the whole warp
    const double norm = sqrt(square_of<T>(row, PowerOfTwo(-largest)));
    const int up = kNormExponent - ilogb(norm);
    exponent = largest - up;
    inverse = scalbn(1 / norm, -up);
  }
  const PowerOfTwo scaled(-exponent);
  Kept<T>* out = side.unit + i * dim;
  row.each([&](int, int64_t at, const Vector<T>& x) {
    Kept<T> kept[kSize];
#pragma unroll
    for (int e = 0; e < kSize; ++e) narrow(usual ? scaled(widen(x.at[e])) : 0.0f, kept + e);
    put<T>(out, at, dim, kept);
  });
  if (threadIdx.x % 32 == 0) {
    side.inverse[i] = static_cast<float>(inverse);
    side.exponent[i] = exponent;
  }
  const int64_t behind = side.count + threadIdx.x % 32;
  if (i + 1 == side.count && behind < (side.count + kPadding - 1) / kPadding * kPadding) {
    side.inverse[behind] = 0;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    unit_rows(const __grid_constant__ ElvaCudaUnitArgs args) {
  int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (i >= args.queries + args.candidates) return;
  const bool of_query = i < args.queries;
  if (!of_query) i -= args.queries;
  const Side<T> side{of_query ? args.query : args.candidate,
                     of_query ? args.queries : args.candidates,
                     static_cast<Kept<T>*>(of_query ? args.query_unit : args.candidate_unit),
                     of_query ? args.query_inverse : args.candidate_inverse,
                     of_query ? args.query_exponent : args.candidate_exponent};
  const Row<T> row{static_cast<const T*>(side.rows.data) + i * side.rows.row_stride,
                   side.rows.stride, 0};
  if (row.is_dense() && args.dim % Vector<T>::kSize == 0 && args.dim <= HeldRow<T>::kColumns) {
    unit_row(side, i, args.dim, HeldRow<T>(row, args.dim));
  } else {
    unit_row(side, i, args.dim, FarRow<T>(row, args.dim));
  }
}

}  // namespace
}  // namespace elva

extern "C" ElvaStatus elva_unit_rows_cuda(const ElvaCudaUnitArgs* args) {
  using namespace elva;
  return on_device(args->dtype, args->device, [args](auto element) {
    const int64_t blocks = (args->queries + args->candidates + kWarps - 1) / kWarps;
    return launch(unit_rows<decltype(element)>, blocks, 0, kThreads, 0, args->stream, *args);
  });
}
