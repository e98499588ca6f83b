// What: slopes of losses on products of embeddings, as factors of matrix products: of softmax rows
//   and columns out of masked products, or of slopes on some candidates.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; contrastive losses (13) and (14), rank
//   reward of a head (12) of elva_kernels.reference.
// In: masked products [R, width] in fp32, inverse norms, peaks and factors of rows and columns; or
//   indices int64 and slopes fp32 [R, n]; the power of two that they share.
// Out: slopes times both inverse norms and that power [R, width]: in fp16, in fp16 beside what that
//   lost in fp16, or in fp32. The slopes of positives are not among them.
// Work split: a block a row.
// Bytes: products once, slopes once.
// Numerics: fp32, rounded once: a slope of one half errs by 2^-12 of itself, or by 2^-40 of the
//   largest that there can be; of two halves by 2^-23. Deterministic.
// Limits: none.
// Reference: elva_kernels.reference.info_nce_gradients, in_batch_gradients.
#include "../elva_in_batch_cuda.h"
#include "scores.h"

namespace elva {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;  // of four slopes, a thread's at a time

// A row of slopes on its way to memory.
template <int kHalves>
class Out {
 public:
  template <class Args>
  __device__ explicit Out(const Args& args)
      : row_(static_cast<Element*>(args.out) + blockIdx.x * args.row_stride),
        all_(args.rows * args.row_stride) {}

  __device__ void put(int64_t j, float slope) const {
    Element high;
    narrow(slope, &high);
    row_[j] = high;
    if constexpr (kHalves == 2) narrow(slope - widen(high), row_ + all_ + j);
  }
  __device__ void put(int64_t j, const float* slopes) const {
    if constexpr (kHalves == 0) {
      Vector<float> all;
#pragma unroll
      for (int e = 0; e < kFour; ++e) all.at[e] = slopes[e];
      store16(row_ + j, all);
    } else {
      Fp16 high[kFour], low[kFour];
#pragma unroll
      for (int e = 0; e < kFour; ++e) {
        narrow(slopes[e], high + e);
        narrow(slopes[e] - widen(high[e]), low + e);
      }
      store(row_ + j, high);
      if constexpr (kHalves == 2) store(row_ + all_ + j, low);
    }
  }

 private:
  using Element = std::conditional_t<kHalves == 0, float, Fp16>;

  // On 8 bytes.
  __device__ static void store(Fp16* p, const Fp16* halves) {
    uint64_t word = 0;
#pragma unroll
    for (int e = 0; e < kFour; ++e) word |= uint64_t{halves[e].bits} << 16 * e;
    *reinterpret_cast<uint64_t*>(p) = word;
  }

  Element* row_;
  int64_t all_;
};

// What turns masked products of a row into its slopes.
class Slopes {
 public:
  __device__ explicit Slopes(const ElvaCudaSlopeArgs& args)
      : args_(args),
        query_(args.query_inverse[blockIdx.x]),
        limit_(limit_of(args.max_score)),
        scale_(scale_of_gaps(args.temperature)),
        peak_(args.row_peak[blockIdx.x]) {
    const double factor = scalbn(static_cast<double>(query_), *args.power);
    factor_ = static_cast<float>(args.row_factor[blockIdx.x] * factor);
    column_scale_ = static_cast<float>(factor);
  }

  __device__ void read(int64_t j, float* slopes) const {
    const Vector<float> products = load16(args_.products + blockIdx.x * args_.width + j),
                        inverses = load16(args_.candidate_inverse + j);
    float scores[kFour];
#pragma unroll
    for (int e = 0; e < kFour; ++e) {
      scores[e] = masked_score(cosine_of(products.at[e], query_, inverses.at[e]), limit_);
      slopes[e] = factor_ * power_of_two((scores[e] - peak_) * scale_);
    }
    if (args_.column_peak != nullptr) {
      const Vector<float> peaks = load16(args_.column_peak + j),
                          factors = load16(args_.column_factor + j);
#pragma unroll
      for (int e = 0; e < kFour; ++e) {
        slopes[e] +=
            column_scale_ * factors.at[e] * power_of_two((scores[e] - peaks.at[e]) * scale_);
      }
    }
#pragma unroll
    for (int e = 0; e < kFour; ++e) {
      slopes[e] = scores[e] > -INFINITY ? slopes[e] * inverses.at[e] : 0.0f;
    }
  }

 private:
  const ElvaCudaSlopeArgs& args_;
  float query_, limit_, scale_, peak_, factor_, column_scale_;
};

// Slopes may lie where the products were: all that a step writes lies before what the next reads,
// and among what it has read.
template <int kHalves>
__global__ void __launch_bounds__(kThreads, 4)
    slope_rows(const __grid_constant__ ElvaCudaSlopeArgs args) {
  const Slopes row(args);
  const Out<kHalves> out(args);
#pragma unroll 1
  for (int64_t first = 0; first < args.width; first += kVectors * kThreads * kFour) {
    const int64_t at = first + static_cast<int64_t>(threadIdx.x) * kFour;
    float slopes[kVectors][kFour];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t j = at + v * kThreads * kFour;
      if (j < args.width) row.read(j, slopes[v]);
    }
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t j = at + v * kThreads * kFour;
      if (j < args.width) out.put(j, slopes[v]);
    }
  }
}

template <int kHalves>
__global__ void __launch_bounds__(kThreads, 4)
    spread_rows(const __grid_constant__ ElvaCudaSpreadArgs args) {
  const Out<kHalves> out(args);
  const float zeros[kFour] = {};
  for (int64_t j = static_cast<int64_t>(threadIdx.x) * kFour; j < args.width;
       j += kThreads * kFour) {
    out.put(j, zeros);
  }
  __syncthreads();
  const double scale = args.query_inverse[blockIdx.x];
  for (int64_t x = args.first_column + threadIdx.x; x < args.columns; x += kThreads) {
    const int64_t j = args.index[blockIdx.x * args.columns + x];
    if (j < 0 || j >= args.candidates) continue;
    const double slope = args.slopes[blockIdx.x * args.columns + x] * scale;
    const float scaled = static_cast<float>(scalbn(slope * args.candidate_inverse[j], *args.power));
    if (!isnan(args.candidate_inverse[j]) && !isnan(scale)) out.put(j, scaled);
  }
}

}  // namespace
}  // namespace elva

extern "C" {

ElvaStatus elva_slope_rows_cuda(const ElvaCudaSlopeArgs* args) {
  using namespace elva;
  return on_device(ELVA_FP32, args->device, [args](auto) {
    void (*const kernels[])(ElvaCudaSlopeArgs) = {slope_rows<0>, slope_rows<1>, slope_rows<2>};
    return launch(kernels[args->halves], args->rows, 0, kThreads, 0, args->stream, *args);
  });
}

ElvaStatus elva_spread_rows_cuda(const ElvaCudaSpreadArgs* args) {
  using namespace elva;
  return on_device(ELVA_FP32, args->device, [args](auto) {
    void (*const kernels[])(ElvaCudaSpreadArgs) = {spread_rows<0>, spread_rows<1>, spread_rows<2>};
    return launch(kernels[args->halves], args->rows, 0, kThreads, 0, args->stream, *args);
  });
}

}  // extern "C"
