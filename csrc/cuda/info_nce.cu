// What: InfoNCE of queries' positives out of sums over their negatives, and what makes slopes of
//   scores; small steps, each in one launch.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; log-sum-exp (11), contrastive losses (13)
//   and (14) of elva_kernels.reference.
// In: scores of positives fp32 [B, P], sums over negatives double, weights of the losses double.
// Out: losses, factors and slopes; see elva_in_batch_cuda.h.
// Work split: a thread a query or a candidate; a block where one number comes of all.
// Bytes: some tens for each pair.
// Numerics: double, rounded once. Sums in an order of their own; no atomics: deterministic.
// Limits: none.
// Reference: elva_kernels.reference.info_nce_of_scores, info_nce_gradients.
#include "../elva_in_batch_cuda.h"
#include "scores.h"

namespace elva {
namespace {

constexpr int kThreads = 64;
constexpr int kReducers = 1024, kReducerWarps = kReducers / 32;  // of a block for one number

__device__ inline int64_t own_place() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }

// Over negatives, as ScoreSums.
struct Sums {
  double peak, sum, moment;
};

// What one direction makes of a pair.
struct Terms {
  double loss = 0;              // NaN for a pair that is not finite
  double share = 0;             // a negative's probability over exp((s - peak) / T)
  double others = 0;            // the negatives' probability
  double grad_temperature = 0;  // d loss / d T
};

__device__ inline Terms terms_of(double target, const Sums& sums, double t) {
  const double peak = sums.peak > -INFINITY ? sums.peak : target;
  const double top = fmax(peak, target);
  const double weight = exp((peak - top) / t);
  const double rest = weight * sums.sum;
  const double whole = rest + exp((target - top) / t);
  Terms terms;
  // A small loss is the logarithm of a number near 1.
  terms.loss = top == target ? log1p(rest) : log(whole) + (top - target) / t;
  terms.share = weight / whole;
  terms.others = terms.share * sums.sum;
  terms.grad_temperature = -terms.share * (sums.moment + sums.sum * (peak - target)) / (t * t);
  return terms;
}

// Eq. 11 of a query: its finite positives and its negatives; NaN where a positive is.
__device__ inline double logsumexp_of(const float* targets, int64_t positives, const Sums& sums,
                                      double inverse_temperature) {
  double top = sums.peak, sum = 0;
  bool sound = true;
  for (int64_t p = 0; p < positives; ++p) {
    sound = sound && !isnan(targets[p]);
    top = fmax(top, static_cast<double>(targets[p]));
  }
  for (int64_t p = 0; p < positives; ++p) {
    if (targets[p] > -INFINITY) sum += exp((targets[p] - top) * inverse_temperature);
  }
  if (sums.peak > -INFINITY) sum += sums.sum * exp((sums.peak - top) * inverse_temperature);
  const double found = sum > 0 || isnan(sum) ? top * inverse_temperature + log(sum) : -INFINITY;
  return sound ? found : nan("");
}

__global__ void __launch_bounds__(kThreads, 8)
    info_nce_pairs(const __grid_constant__ ElvaCudaPairsArgs args) {
  const int64_t i = own_place();
  if (i >= args.rows) return;
  const double t = *args.temperature > 0 ? *args.temperature : nan(""), inverse_temperature = 1 / t;
  const int64_t first = i * args.positives, last = first + args.positives;
  const Sums row{args.peak[i], args.sum[i], args.moment[i]};
  args.logsumexp[i] = static_cast<float>(
      logsumexp_of(args.target_score + first, args.positives, row, inverse_temperature));
  if (args.loss == nullptr && args.weight == nullptr) return;
  int64_t there = 0;
  for (int64_t x = first; x < last; ++x) there += args.target[x] != -1;
  const bool both = args.column_peak != nullptr;
  const double each = (both ? 0.5 : 1.0) / static_cast<double>(there > 1 ? there : 1);
  const double upstream = args.weight == nullptr ? 0 : args.weight[i] * each;
  double loss = 0, factor = 0;
#pragma unroll 1
  for (int64_t x = first; x < last; ++x) {
    const double target = args.target_score[x];
    const bool sound = isfinite(target);  // of a candidate
    if (!sound && args.target[x] != -1) loss = nan("");
    Terms of_row, of_column;
    if (sound) of_row = terms_of(target, row, t);
    if (sound && both) {
      const int64_t at = args.target[x];
      of_column =
          terms_of(target, {args.column_peak[at], args.column_sum[at], args.column_moment[at]}, t);
    }
    loss += (of_row.loss + of_column.loss) * each;
    if (args.weight == nullptr) continue;
    const double slope = sound ? upstream * inverse_temperature : 0.0;
    args.target_slope[x] = static_cast<float>(-slope * (of_row.others + of_column.others));
    args.temperature_slope[x] =
        sound ? upstream * (of_row.grad_temperature + of_column.grad_temperature) : 0.0;
    if (both) args.column_share[x] = slope * of_column.share;
    factor += slope * of_row.share;
  }
  if (args.loss != nullptr) args.loss[i] = static_cast<float>(loss);
  if (args.weight != nullptr) args.row_factor[i] = static_cast<float>(factor);
}

__global__ void __launch_bounds__(kThreads)
    column_factor(const __grid_constant__ ElvaCudaColumnFactorArgs args) {
  const int64_t j = own_place();
  if (j >= args.width) return;
  const bool listed = args.first != nullptr;
  int64_t begin = j, end = j < args.count ? j + 1 : j;
  if (j >= args.candidates) {
    end = begin;
  } else if (listed) {
    begin = args.first[j];
    end = args.first[j + 1];
  }
  double sum = 0;
  for (int64_t n = begin; n < end; ++n) sum += args.share[listed ? args.order[n] : n];
  args.factor[j] = static_cast<float>(sum);
}

// Of a block of kReducers, in an order of its own, on the first thread.
__device__ inline double reduced_sum(double x, double* shared) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; threadIdx.x == 0 && w < kReducerWarps; ++w) sum += shared[w];
  return sum;
}
// On every thread.
__device__ inline double reduced_max(float x, double* shared) {
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double largest = 0;
  for (int w = 0; w < kReducerWarps; ++w) largest = fmax(largest, shared[w]);
  return largest;
}

// The power of two of slopes, of which none is above `largest`.
__device__ inline int power_of(float largest) {
  constexpr int kLargest = 14, kInverses = 28;
  constexpr float kLeast = 0x1p-90f;  // below it the power might leave the range of a float
  if (!(largest < INFINITY)) return 0;
  return kLargest + kInverses - ilogbf(largest > kLeast ? largest : kLeast);
}

__global__ void __launch_bounds__(kReducers)
    info_nce_total(const __grid_constant__ ElvaCudaTotalArgs args) {
  ELVA_DYNAMIC_SHARED(memory);
  double* shared = reinterpret_cast<double*>(memory);
  if (args.power != nullptr) {
    const double scale = args.temperature == nullptr ? 1.0 : inverse_of(args.temperature);
    float row = 0, column = 0;
    for (int64_t i = threadIdx.x; i < args.rows; i += kReducers) {
      row = fmaxf(row, static_cast<float>(fabs(args.weight[i] * scale)));
    }
    for (int64_t j = threadIdx.x; args.column_factor != nullptr && j < args.columns;
         j += kReducers) {
      column = fmaxf(column, fabsf(args.column_factor[j]));
    }
    const double largest = reduced_max(row, shared) + reduced_max(column, shared);
    if (threadIdx.x == 0) *args.power = power_of(static_cast<float>(largest));
  }
  if (args.grad_temperature != nullptr) {
    double sum = 0;
    for (int64_t x = threadIdx.x; x < args.pairs; x += kReducers) sum += args.temperature_slope[x];
    sum = reduced_sum(sum, shared);
    if (threadIdx.x == 0) *args.grad_temperature = sum;
  }
}

// `kernel` on a thread for each of `count`.
template <class Args>
ElvaStatus launch_each(void (*kernel)(Args), int64_t count, const Args& args) {
  return on_device(ELVA_FP32, args.device, [&](auto) {
    return launch(kernel, blocks_of(count, kThreads), 0, kThreads, 0, args.stream, args);
  });
}

}  // namespace
}  // namespace elva

extern "C" {

ElvaStatus elva_info_nce_pairs_cuda(const ElvaCudaPairsArgs* args) {
  return elva::launch_each(elva::info_nce_pairs, args->rows, *args);
}

ElvaStatus elva_column_factor_cuda(const ElvaCudaColumnFactorArgs* args) {
  return elva::launch_each(elva::column_factor, args->width, *args);
}

ElvaStatus elva_info_nce_total_cuda(const ElvaCudaTotalArgs* args) {
  using namespace elva;
  return on_device(ELVA_FP32, args->device, [args](auto) {
    return launch(info_nce_total, 1, 1, kReducers, kReducerWarps * sizeof(double), args->stream,
                  *args);
  });
}

}  // extern "C"
