// What: sums of exponentials over columns of masked scores, for the other direction of InfoNCE.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; log-sum-exp (11), contrastive loss (14) of
//   elva_kernels.reference.
// In: masked products [R, width] in fp32, inverse norms of their rows.
// Out: peaks fp32 and sums double [width], fresh or added to.
// Work split: a thread a column of 128 rows; then a thread a column of their sums.
// Bytes: products once; 20 bytes for each 128 of them, written and read.
// Numerics: exponentials and sums of 8 in fp32, those sums in double, in order. No atomics:
//   deterministic.
// Limits: none.
// Reference: elva_kernels.reference.info_nce_of_scores.
#include "../elva_in_batch_cuda.h"
#include "scores.h"

namespace elva {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPartRows = 128;
constexpr int kColumns = 64;  // of a block that adds parts

// Where the sums of [parts, width] are: of kPartRows rows each.
struct Args {
  ElvaCudaColumnArgs column;
  int64_t parts;
  double *sum, *moment;
  float* peak;
};

__global__ void __launch_bounds__(kThreads, 2) column_parts(const __grid_constant__ Args args) {
  constexpr int kRows = 8;  // read at a time
  const ElvaCudaColumnArgs& column = args.column;
  const int64_t part = blockIdx.x % args.parts,
                j = blockIdx.x / args.parts * kThreads + threadIdx.x;
  if (j >= column.width) return;
  const float scale = scale_of_gaps(column.temperature), limit = limit_of(column.max_score),
              inverse = column.candidate_inverse[j];
  const int64_t first = part * kPartRows,
                last = first + kPartRows < column.rows ? first + kPartRows : column.rows;
  ScoreSums all;
#pragma unroll 1
  for (int64_t i = first; i < last; i += kRows) {
    float scores[kRows], highest = -INFINITY;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      scores[r] = i + r < last ? column.products[(i + r) * column.width + j] : nanf("");
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float query = i + r < last ? column.query_inverse[i + r] : 0.0f;
      scores[r] = masked_score(cosine_of(scores[r], query, inverse), limit);
      highest = fmaxf(highest, scores[r]);
    }
    all.add<kRows>(scores, highest, scale);
  }
  const int64_t at = part * column.width + j;
  args.peak[at] = all.peak;
  args.sum[at] = all.sum;
  args.moment[at] = all.moment;
}

// Adds the parts, in order.
__global__ void __launch_bounds__(kColumns) column_sums(const __grid_constant__ Args args) {
  constexpr int kParts = 8;  // read at a time
  const ElvaCudaColumnArgs& column = args.column;
  const int64_t j = int64_t{blockIdx.x} * kColumns + threadIdx.x;
  if (j >= column.width) return;
  const float scale = scale_of_gaps(column.temperature);
  ScoreSums all;
  if (!column.is_first) all = {column.peak[j], column.sum[j], column.moment[j]};
#pragma unroll 1
  for (int64_t first = 0; first < args.parts; first += kParts) {
    ScoreSums parts[kParts];
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int64_t at = (first + i) * column.width + j;
      if (first + i < args.parts) parts[i] = {args.peak[at], args.sum[at], args.moment[at]};
    }
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      all.raise(parts[i].peak, scale);
      parts[i].raise(all.peak, scale);
      all.sum += parts[i].sum;
      all.moment += parts[i].moment;
    }
  }
  column.peak[j] = all.peak;
  column.sum[j] = all.sum;
  column.moment[j] = all.moment;
}

}  // namespace
}  // namespace elva

extern "C" {

int64_t elva_column_scratch_bytes_cuda(int64_t rows, int64_t width) {
  return elva::blocks_of(rows, elva::kPartRows) * width *
         static_cast<int64_t>(2 * sizeof(double) + sizeof(float));
}

ElvaStatus elva_column_sums_cuda(const ElvaCudaColumnArgs* args) {
  using namespace elva;
  return on_device(ELVA_FP32, args->device, [args](auto) {
    const int64_t parts = blocks_of(args->rows, kPartRows), count = parts * args->width;
    double* sum = static_cast<double*>(args->scratch);
    const Args all{*args, parts, sum, sum + count, reinterpret_cast<float*>(sum + 2 * count)};
    const ElvaStatus status = launch(column_parts, blocks_of(args->width, kThreads) * parts, 0,
                                     kThreads, 0, args->stream, all);
    if (status != ELVA_OK) return status;
    return launch(column_sums, blocks_of(args->width, kColumns), 0, kColumns, 0, args->stream, all);
  });
}

}  // extern "C"
