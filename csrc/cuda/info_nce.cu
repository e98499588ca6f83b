// What: InfoNCE of queries' positives out of sums over their negatives, and what makes slopes of
//   scores; small steps, each in one launch.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; log-sum-exp (11), contrastive losses (13)
//   and (14) of elva_kernels.reference.
// In: scores of positives fp32 [B, P], sums over negatives double, weights of the losses double.
// Out: losses, factors and slopes; see elva_in_batch_cuda.h.
// Work split: a thread a pair, a query or a candidate; a block where one number comes of all.
// Bytes: some tens for each pair.
// Numerics: double, rounded once. Sums in an order of their own; no atomics: deterministic.
// Limits: none.
// Reference: elva_kernels.reference.info_nce_of_scores, info_nce_gradients.
#include "../elva_in_batch_cuda.h"
#include "scores.h"

namespace elva {
namespace {

constexpr int kThreads = 128;
constexpr int kReducers = 1024, kReducerWarps = kReducers / 32;  // of a block for one number

__device__ inline int64_t own_place() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }

__global__ void __launch_bounds__(kThreads, 4)
    info_nce_terms(const __grid_constant__ ElvaCudaTermsArgs args) {
  const int64_t i = own_place();
  if (i >= args.count) return;
  const double t = inverse_of(args.temperature) > 0 ? *args.temperature : nan("");
  const double target = args.target_score[i];
  if (!isfinite(target)) {
    args.loss[i] = target < 0 ? 0.0 : nan("");
    args.share[i] = args.others[i] = args.grad_temperature[i] = 0;
    return;
  }
  const int64_t at = args.at == nullptr ? i / args.positives : args.at[i];
  const double found = args.peak[at], sum = args.sum[at];
  const double peak = found > -INFINITY ? found : target;
  const double top = fmax(peak, target);
  const double weight = exp((peak - top) / t);
  const double rest = weight * sum;
  const double whole = rest + exp((target - top) / t);
  // A small loss is the logarithm of a number near 1.
  args.loss[i] = top == target ? log1p(rest) : log(whole) + (top - target) / t;
  const double share = weight / whole;
  args.share[i] = share;
  args.others[i] = share * sum;
  args.grad_temperature[i] = -share * (args.moment[at] + sum * (peak - target)) / (t * t);
}

__global__ void __launch_bounds__(kThreads, 4)
    info_nce_factors(const __grid_constant__ ElvaCudaFactorsArgs args) {
  const int64_t i = own_place();
  if (i >= args.rows) return;
  const int64_t first = i * args.positives, last = first + args.positives;
  int64_t there = 0;
  for (int64_t x = first; x < last; ++x) there += args.target[x] != -1;
  const double weight =
      args.weight_factor * args.weight[i] / static_cast<double>(there > 1 ? there : 1);
  const double inverse_temperature = inverse_of(args.temperature);
  double factor = 0;
  for (int64_t x = first; x < last; ++x) {
    args.upstream[x] = isfinite(args.target_score[x]) ? weight : 0.0;
    const double upstream = args.upstream[x] * inverse_temperature;
    const double others = args.others[x] + (args.more_others == nullptr ? 0 : args.more_others[x]);
    args.target_slope[x] = static_cast<float>(-upstream * others);
    factor += upstream * args.share[x];
  }
  args.row_factor[i] = static_cast<float>(factor);
}

__global__ void __launch_bounds__(kThreads, 4)
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
  for (int64_t n = begin; n < end; ++n) {
    const int64_t pair = listed ? args.order[n] : n;
    sum += args.upstream == nullptr ? args.share[pair] : args.share[pair] * args.upstream[pair];
  }
  const double scale = args.temperature == nullptr ? 1.0 : inverse_of(args.temperature);
  args.factor[j] = static_cast<float>(sum * scale);
}

// Of a block of kReducers, on the first thread, in an order of its own.
__device__ inline double reduced_sum(double x, double* shared) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; threadIdx.x == 0 && w < kReducerWarps; ++w) sum += shared[w];
  return sum;
}
__device__ inline float reduced_max(float x, float* shared) {
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  for (int w = 0; w < kReducerWarps; ++w) x = fmaxf(x, shared[w]);
  return x;
}

__global__ void __launch_bounds__(kReducers)
    slope_power(const __grid_constant__ ElvaCudaPowerArgs args) {
  // A slope is the largest factor or less: that of a row is no more than its weight over T.
  constexpr int kLargest = 14, kInverses = 28;
  constexpr float kLeast = 0x1p-90f;  // below it the power might leave the range of a float
  ELVA_DYNAMIC_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const double scale =
      args.weight_factor * (args.temperature == nullptr ? 1.0 : inverse_of(args.temperature));
  float row = 0, column = 0;
  for (int64_t i = threadIdx.x; i < args.rows; i += kReducers) {
    row = fmaxf(row, static_cast<float>(fabs(args.weight[i] * scale)));
  }
  for (int64_t j = threadIdx.x; args.column_factor != nullptr && j < args.columns; j += kReducers) {
    column = fmaxf(column, fabsf(args.column_factor[j]));
  }
  const float largest = reduced_max(row, shared) + reduced_max(column, shared);
  if (threadIdx.x > 0) return;
  const bool usual = largest >= kLeast && largest < INFINITY;
  *args.power = kLargest + kInverses - ilogbf(usual ? largest : largest < kLeast ? kLeast : 1.0f);
}

__global__ void __launch_bounds__(kThreads, 4)
    info_nce_loss(const __grid_constant__ ElvaCudaLossArgs args) {
  const int64_t i = own_place();
  if (i >= args.rows) return;
  const double inverse_temperature = inverse_of(args.temperature);
  const int64_t first = i * args.positives, last = first + args.positives;
  const double peak = args.peak[i];
  double top = peak, loss = 0;
  int64_t there = 0;
  bool sound = true;
  for (int64_t x = first; x < last; ++x) {
    const double target = args.target_score[x];
    sound = sound && !isnan(target);
    top = fmax(top, target);
    if (args.target[x] == -1 || args.row_loss == nullptr) continue;
    ++there;
    loss += args.column_loss == nullptr ? args.row_loss[x]
                                        : (args.row_loss[x] + args.column_loss[x]) / 2;
  }
  double sum = 0;
  for (int64_t x = first; x < last; ++x) {
    const double target = args.target_score[x];
    if (target > -INFINITY) sum += exp((target - top) * inverse_temperature);
  }
  if (peak > -INFINITY) sum += args.sum[i] * exp((peak - top) * inverse_temperature);
  const double found = sum > 0 || isnan(sum) ? top * inverse_temperature + log(sum) : -INFINITY;
  args.logsumexp[i] = static_cast<float>(sound ? found : nan(""));
  if (args.row_loss != nullptr) {
    args.loss[i] = static_cast<float>(loss / static_cast<double>(there > 1 ? there : 1));
  }
}

__global__ void __launch_bounds__(kReducers)
    temperature_gradient(const __grid_constant__ ElvaCudaTemperatureArgs args) {
  ELVA_DYNAMIC_SHARED(memory);
  double sum = 0;
  for (int64_t x = threadIdx.x; x < args.count; x += kReducers) {
    const double column = args.column_slope == nullptr ? 0.0 : args.column_slope[x];
    sum += args.upstream[x] * (args.row_slope[x] + column);
  }
  sum = reduced_sum(sum, reinterpret_cast<double*>(memory));
  if (threadIdx.x == 0) *args.grad_temperature = sum;
}

// `kernel` on a thread for each of `count`.
template <class Args>
ElvaStatus launch_each(void (*kernel)(Args), int64_t count, const Args& args) {
  return on_device(ELVA_FP32, args.device, [&](auto) {
    return launch(kernel, blocks_of(count, kThreads), 0, kThreads, 0, args.stream, args);
  });
}
// On one block.
template <class Args>
ElvaStatus launch_block(void (*kernel)(Args), const Args& args) {
  return on_device(ELVA_FP32, args.device, [&](auto) {
    return launch(kernel, 1, 1, kReducers, kReducerWarps * sizeof(double), args.stream, args);
  });
}

}  // namespace
}  // namespace elva

extern "C" {

ElvaStatus elva_info_nce_terms_cuda(const ElvaCudaTermsArgs* args) {
  return elva::launch_each(elva::info_nce_terms, args->count, *args);
}

ElvaStatus elva_info_nce_factors_cuda(const ElvaCudaFactorsArgs* args) {
  return elva::launch_each(elva::info_nce_factors, args->rows, *args);
}

ElvaStatus elva_column_factor_cuda(const ElvaCudaColumnFactorArgs* args) {
  return elva::launch_each(elva::column_factor, args->width, *args);
}

ElvaStatus elva_slope_power_cuda(const ElvaCudaPowerArgs* args) {
  return elva::launch_block(elva::slope_power, *args);
}

ElvaStatus elva_info_nce_loss_cuda(const ElvaCudaLossArgs* args) {
  return elva::launch_each(elva::info_nce_loss, args->rows, *args);
}

ElvaStatus elva_temperature_gradient_cuda(const ElvaCudaTemperatureArgs* args) {
  return elva::launch_block(elva::temperature_gradient, *args);
}

}  // extern "C"
