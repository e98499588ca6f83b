// What: the steps of the in-batch ops around the matrix products: unit rows, statistics of rows of
//   products, sums over columns, slopes in place, gradients on rows.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; cosine (8), negatives (9), rank (10),
//   log-sum-exp (11), contrastive losses (13) and (14) of elva_kernels.reference.
// In: rows in bf16, fp16 or fp32, any strides; products of unit rows [R, width] in fp32; targets,
//   other candidates that are no negatives.
// Out: see elva_in_batch.h; products become masked scores (-inf where a candidate is no negative),
//   then slopes.
// Work split: a warp a row of embeddings; a block a row of scores; a thread a column of 128 rows.
// Bytes: a row of scores is read twice (again from cache) and written once, and once more from cache
//   for every 4 positives after the first; a chunk's columns once; slopes once each.
// Numerics: exponentials in fp32, sums in double in an order of their own. Ties by lower index. No
//   atomics: deterministic.
// Limits: none.
// Reference: elva_kernels.reference.
#include "../elva_in_batch.h"
#include "rows.h"
#include "words.h"

namespace elva {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kSegment = 2048;

// A row that a warp holds: the lane's vectors at (32 v + lane) kSize, zeros beyond.
constexpr int kHeld = 8;
template <class T>
constexpr int64_t kHeldColumns = int64_t{kHeld} * 32 * Vector<T>::kSize;

template <class T>
__device__ inline int64_t held_at(int v) {
  return (v * 32 + static_cast<int64_t>(threadIdx.x % 32)) * Vector<T>::kSize;
}

// As row_sums.
template <class T>
__device__ inline double held_square(const Words* held) {
  float squares[4] = {};
#pragma unroll
  for (int v = 0; v < kHeld; ++v) {
    const Vector<T> x = elements<T>(held[v]);
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) {
      squares[i % 4] = fmaf(widen(x.at[i]), widen(x.at[i]), squares[i % 4]);
    }
  }
  return warp_sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    unit_rows(const __grid_constant__ ElvaCudaUnitArgs args) {
  static_assert(kHeldColumns<T> <= kSegment);
  const int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (i >= args.count) return;
  T* out = static_cast<T*>(args.unit) + i * args.dim;
  Row<T> row{static_cast<const T*>(args.rows.data) + i * args.rows.row_stride, args.rows.stride, 0};
  const bool is_held =
      row.is_dense() && args.dim % Vector<T>::kSize == 0 && args.dim <= kHeldColumns<T>;
  Words held[kHeld];
  double square;
  if (is_held) {
#pragma unroll
    for (int v = 0; v < kHeld; ++v) {
      held[v] = held_at<T>(v) < args.dim ? words_at(row.data + held_at<T>(v)) : Words{};
    }
    square = held_square<T>(held);
  } else {
    square = row_sums(row, row, args.dim, kSegment).y;
  }
  const double norm = norm_of(&row, square, args.dim, kSegment);
  if (is_held && norm > 0 && row.exponent == 0) {
#pragma unroll
    for (int v = 0; v < kHeld; ++v) {
      if (held_at<T>(v) < args.dim) store16(out + held_at<T>(v), elements<T>(held[v]));
    }
  } else {
    for (int64_t at = threadIdx.x % 32; at < args.dim; at += 32) {
      narrow(isnan(norm) ? 0.0f : row[at], out + at);
    }
  }
  if (threadIdx.x % 32 == 0) {
    args.norm[2 * i] = norm > 0 ? 1 / norm : norm;  // 0 or NaN
    args.norm[2 * i + 1] = row.exponent;
  }
}

// kSize elements from `at` of a unit row and of its slopes; zeros beyond `dim`.
template <class T>
__device__ inline void read_slopes(const T* unit, const float* slope, int64_t at, int64_t dim,
                                   bool vectors, float* x, float* y) {
  constexpr int kSize = Vector<T>::kSize;
  if (vectors) {
    const Vector<T> units = load16(unit + at);
    Vector<float> slopes[kSize / 4];
#pragma unroll
    for (int v = 0; v < kSize / 4; ++v) slopes[v] = load16(slope + at + 4 * v);
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = widen(units.at[i]), y[i] = slopes[i / 4].at[i % 4];
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      x[i] = at + i < dim ? widen(unit[at + i]) : 0.0f;
      y[i] = at + i < dim ? slope[at + i] : 0.0f;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    unit_gradient(const __grid_constant__ ElvaCudaGradientArgs args) {
  constexpr int kSize = Vector<T>::kSize;
  const int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (i >= args.count) return;
  const T* unit = static_cast<const T*>(args.unit) + i * args.dim;
  const float* slope = args.grad_unit + i * args.dim;
  T* out = static_cast<T*>(args.grad_rows) + i * args.dim;
  const double inverse = args.norm[2 * i];
  const int exponent = static_cast<int>(args.norm[2 * i + 1]);
  const bool vectors = args.dim % kSize == 0;
  const int64_t first = static_cast<int64_t>(threadIdx.x % 32) * kSize;
  double dot = 0;
#pragma unroll 2
  for (int64_t at = first; at < args.dim; at += 32 * kSize) {
    float x[kSize], y[kSize];
    read_slopes(unit, slope, at, args.dim, vectors, x, y);
#pragma unroll
    for (int e = 0; e < kSize; ++e) dot += static_cast<double>(x[e]) * y[e];
  }
  dot = warp_sum(dot) * inverse;
  for (int64_t at = first; at < args.dim; at += 32 * kSize) {
    float x[kSize], y[kSize];
    read_slopes(unit, slope, at, args.dim, vectors, x, y);
    Vector<T> gradient;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const double along = dot * inverse * x[e];
      narrow(scalbn((y[e] - along) * inverse, -exponent), gradient.at + e);
    }
    if (vectors) {
      store16(out + at, gradient);
    } else {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        if (at + e < args.dim) out[at + e] = gradient.at[e];
      }
    }
  }
}

// In [-1, 1], and 0 where the products may have underflowed; never -0.
__device__ inline float clamped(double product) {
  const float score = static_cast<float>(product);
  if (fabsf(score) < 0x1p-50f) return 0;
  return score > 1 ? 1.0f : score < -1 ? -1.0f : score;
}

__device__ inline bool is_before(float score, int64_t index, float other, int64_t other_index) {
  return score > other || (score == other && index < other_index);
}

// Of a block: every warp's value into `shared` [kWarps], then the first thread adds them in order.
template <class V>
__device__ inline V block_sum(V x, V* shared) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  V sum = shared[0];
  for (int w = 1; w < kWarps; ++w) sum += shared[w];
  return sum;
}

constexpr int kTogether = 4;  // positives from the second that are counted in a pass

// How a row's negatives stand to a score.
struct Counts {
  int greater = 0, equal = 0;

  __device__ void add(float negative, float score) {
    greater += negative > score;
    equal += negative == score;
  }
};

struct ScoreShared {
  double sums[kWarps];
  int64_t places[kWarps];
  float bests[kWarps];
  int counts[kWarps];
  Counts further[kWarps * kTogether];
};

// What negatives are held against for a positive's score: counts are finite negatives for a pair
// that is not finite, nothing where there is no positive.
__device__ inline float bar_of(float score) {
  return isnan(score) ? -INFINITY : score == -INFINITY ? INFINITY : score;
}

// A query's positives, and its other candidates that are no negatives.
class Positives {
 public:
  __device__ Positives(const ElvaCudaScoreArgs& args, int64_t i)
      : args_(args),
        i_(i),
        target_(args.target + i * args.positives),
        score_(args.target_score + i * args.positives),
        query_(args.query_norm[2 * i]) {}

  // Of products that are not masked yet.
  __device__ float score_of(const float* row, int64_t p) const {
    const int64_t j = target_[p];
    if (j == -1) return -INFINITY;
    if (!is_candidate(j)) return nanf("");
    const double norm = args_.candidate_inverse[j];
    return isnan(query_) || isnan(norm) ? nanf("") : clamped(row[j] * query_ * norm);
  }
  __device__ void write_scores(const float* row) const {
    for (int64_t p = threadIdx.x; p < args_.positives; p += kThreads) score_[p] = score_of(row, p);
  }
  // NaN in the place of the products of all that are no negatives. No product is NaN.
  __device__ void mask(float* row) const {
    for (int64_t p = threadIdx.x; p < args_.positives; p += kThreads) mask(row, target_[p]);
    if (args_.skipped == nullptr) return;
    for (int64_t s = 0; s < args_.segments; ++s) {
      const int64_t last = args_.skipped_last[i_ * args_.segments + s];
      for (int64_t x = args_.skipped_first[i_ * args_.segments + s] + threadIdx.x; x < last;
           x += kThreads) {
        mask(row, args_.skipped[x]);
      }
    }
  }
  // Where the negatives that are not finite are `unsound`.
  __device__ void write_counts(int64_t p, const Counts& counts, int unsound) const {
    const bool there = target_[p] != -1;
    const int64_t at = i_ * args_.positives + p;
    args_.n_greater[at] = there ? counts.greater : 0;
    args_.n_equal[at] = !there ? 0 : isnan(score_[p]) ? unsound : counts.equal;
  }
  // After write_scores, on all threads.
  __device__ float bar(int64_t p) const { return bar_of(score_[p]); }

 private:
  __device__ bool is_candidate(int64_t j) const { return j >= 0 && j < args_.candidates; }
  __device__ void mask(float* row, int64_t j) const {
    if (is_candidate(j)) row[j] = nanf("");
  }

  const ElvaCudaScoreArgs& args_;
  int64_t i_;
  const int64_t* target_;
  float* score_;
  double query_;
};

// Of the finished row: the counts of the positives from the second, kTogether in a pass. A pass is
// left out where none of its scores is within the negatives'.
__device__ inline void count_further(const ElvaCudaScoreArgs& args, const Positives& positives,
                                     const float* row, float hardest, int unsound, Counts* shared) {
  for (int64_t first = 1; first < args.positives; first += kTogether) {
    float bars[kTogether];
    bool within = false;
#pragma unroll
    for (int q = 0; q < kTogether; ++q) {
      bars[q] = first + q < args.positives ? positives.bar(first + q) : INFINITY;
      within = within || (bars[q] <= hardest && hardest > -INFINITY);
    }
    Counts counts[kTogether];
    if (within) {
#pragma unroll 4
      for (int64_t j = threadIdx.x; j < args.candidates; j += kThreads) {
        const float score = row[j];
#pragma unroll
        for (int q = 0; q < kTogether; ++q) counts[q].add(score, bars[q]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int q = 0; q < kTogether; ++q) {
      const int greater = warp_sum(counts[q].greater), equal = warp_sum(counts[q].equal);
      if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32 * kTogether + q] = {greater, equal};
    }
    __syncthreads();
    const int64_t p = first + threadIdx.x;
    if (threadIdx.x < kTogether && p < args.positives) {
      Counts all;
      for (int w = 0; w < kWarps; ++w) {
        all.greater += shared[w * kTogether + threadIdx.x].greater;
        all.equal += shared[w * kTogether + threadIdx.x].equal;
      }
      positives.write_counts(p, all, unsound);
    }
  }
}

__global__ void __launch_bounds__(kThreads, 5)
    score_rows(const __grid_constant__ ElvaCudaScoreArgs args) {
  constexpr int kAtOnce = 4;
  ELVA_DYNAMIC_SHARED(memory);
  ScoreShared& shared = *reinterpret_cast<ScoreShared*>(memory);
  const int64_t i = blockIdx.x;
  float* row = args.scores + i * args.width;
  const Positives positives(args, i);
  const double query = args.query_norm[2 * i];
  const bool bad_query = isnan(query);
  const float first_bar = args.positives > 0 ? bar_of(positives.score_of(row, 0)) : INFINITY;
  positives.write_scores(row);
  __syncthreads();
  positives.mask(row);
  __syncthreads();
  Counts counts;
  int unsound = 0;
  float hardest = -INFINITY;
  int64_t place = -1;
#pragma unroll 1
  for (int64_t first = threadIdx.x; first < args.width; first += kAtOnce * kThreads) {
    float products[kAtOnce];
    double norms[kAtOnce];
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const int64_t j = first + r * kThreads;
      products[r] = j < args.width ? row[j] : 0.0f;
      norms[r] = j < args.candidates ? args.candidate_inverse[j] : 0.0;
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const int64_t j = first + r * kThreads;
      float score = -INFINITY;
      if (j < args.candidates && !isnan(products[r])) {
        if (bad_query || isnan(norms[r])) {
          ++unsound;
        } else {
          score = clamped(products[r] * query * norms[r]);
          if (static_cast<double>(score) > args.max_score) score = -INFINITY;
        }
      }
      counts.add(score, first_bar);
      if (j < args.width) row[j] = score;
      if (score > hardest) hardest = score, place = j;
    }
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, hardest, offset);
    const int64_t other_place = __shfl_xor_sync(kAllLanes, place, offset);
    if (other > -INFINITY && is_before(other, other_place, hardest, place)) {
      hardest = other, place = other_place;
    }
  }
  counts.greater = block_sum(counts.greater, shared.counts);
  counts.equal = block_sum(counts.equal, shared.counts);
  unsound = block_sum(unsound, shared.counts);
  if (threadIdx.x % 32 == 0) {
    shared.bests[threadIdx.x / 32] = hardest;
    shared.places[threadIdx.x / 32] = place;
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    const float best = shared.bests[w];
    const int64_t at = shared.places[w];
    if (best > -INFINITY && (place < 0 || is_before(best, at, hardest, place))) {
      hardest = best, place = at;
    }
  }
  if (threadIdx.x == 0) {
    if (args.positives > 0) positives.write_counts(0, counts, unsound);
    args.hardest_score[i] = hardest;
    args.hardest_index[i] = place;
  }
  count_further(args, positives, row, hardest, unsound, shared.further);
  if (args.temperature == nullptr) return;
  const float inverse_temperature = static_cast<float>(1 / *args.temperature);
  double sum = 0, moment = 0;
#pragma unroll 1
  for (int64_t first = threadIdx.x; first < args.width; first += kAtOnce * kThreads) {
    float scores[kAtOnce];  // its own stores
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const int64_t j = first + r * kThreads;
      scores[r] = j < args.width ? row[j] : -INFINITY;
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      if (scores[r] == -INFINITY) continue;
      const float gap = scores[r] - hardest, term = expf(gap * inverse_temperature);
      sum += term;
      moment += static_cast<double>(term) * gap;
    }
  }
  sum = block_sum(sum, shared.sums);
  moment = block_sum(moment, shared.sums);
  if (threadIdx.x == 0) {
    args.sum[i] = sum;
    args.moment[i] = moment;
  }
}

// Of a column's masked scores.
struct ColumnSums {
  float peak;
  double sum, moment;

  // So that the peak is `to` or more.
  __device__ void raise(float to, float inverse_temperature) {
    if (!(to > peak)) return;
    if (peak > -INFINITY) {
      const float grown = peak - to;
      const double shrink = expf(grown * inverse_temperature);
      moment = (moment + sum * grown) * shrink;
      sum *= shrink;
    }
    peak = to;
  }
};

// Where the sums of [parts, width] are: of kPartRows rows each.
constexpr int64_t kPartRows = 128;
constexpr int kColumns = 64;  // of a block that adds parts
struct ColumnArgs {
  ElvaCudaColumnArgs column;
  int64_t parts;
  double *sum, *moment;
  float* peak;
};

__global__ void __launch_bounds__(kThreads, 2)
    column_parts(const __grid_constant__ ColumnArgs args) {
  constexpr int kRows = 8;  // read at a time
  const ElvaCudaColumnArgs& column = args.column;
  const int64_t part = blockIdx.x % args.parts,
                j = blockIdx.x / args.parts * kThreads + threadIdx.x;
  if (j >= column.width) return;
  const float inverse_temperature = static_cast<float>(1 / *column.temperature);
  const int64_t first = part * kPartRows,
                last = first + kPartRows < column.rows ? first + kPartRows : column.rows;
  ColumnSums all{-INFINITY, 0, 0};
#pragma unroll 1
  for (int64_t i = first; i < last; i += kRows) {
    float scores[kRows], peak = -INFINITY;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      scores[r] = i + r < last ? column.scores[(i + r) * column.width + j] : -INFINITY;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) peak = fmaxf(peak, scores[r]);
    all.raise(peak, inverse_temperature);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (scores[r] == -INFINITY) continue;
      const float gap = scores[r] - all.peak, term = expf(gap * inverse_temperature);
      all.sum += term;
      all.moment += static_cast<double>(term) * gap;
    }
  }
  const int64_t at = part * column.width + j;
  args.peak[at] = all.peak;
  args.sum[at] = all.sum;
  args.moment[at] = all.moment;
}

// Adds the parts, in order.
__global__ void __launch_bounds__(kColumns) column_sums(const __grid_constant__ ColumnArgs args) {
  constexpr int kParts = 8;  // read at a time
  const ElvaCudaColumnArgs& column = args.column;
  const int64_t j = int64_t{blockIdx.x} * kColumns + threadIdx.x;
  if (j >= column.width) return;
  const float inverse_temperature = static_cast<float>(1 / *column.temperature);
  ColumnSums all{column.peak[j], column.sum[j], column.moment[j]};
#pragma unroll 1
  for (int64_t first = 0; first < args.parts; first += kParts) {
    ColumnSums parts[kParts];
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int64_t at = (first + i) * column.width + j;
      parts[i] = first + i < args.parts ? ColumnSums{args.peak[at], args.sum[at], args.moment[at]}
                                        : ColumnSums{-INFINITY, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      all.raise(parts[i].peak, inverse_temperature);
      parts[i].raise(all.peak, inverse_temperature);
      all.sum += parts[i].sum;
      all.moment += parts[i].moment;
    }
  }
  column.peak[j] = all.peak;
  column.sum[j] = all.sum;
  column.moment[j] = all.moment;
}

// The slopes of a query's positives: of those that name the same candidate in order, by the thread
// of the first of them.
__device__ inline void add_target_slopes(const ElvaCudaSlopeArgs& args, const int64_t* target,
                                         const float* slopes, float* row) {
  for (int64_t p = threadIdx.x; p < args.positives; p += kThreads) {
    const int64_t own = target[p];
    bool is_first = own >= 0;
#pragma unroll 1
    for (int64_t q = 0; is_first && q < p; ++q) is_first = target[q] != own;
    if (!is_first) continue;
    float slope = row[own];
#pragma unroll 1
    for (int64_t q = p; q < args.positives; ++q) {
      if (target[q] == own) slope += slopes[q];
    }
    row[own] = slope;
  }
}

__global__ void __launch_bounds__(kThreads, 6)
    slope_rows(const __grid_constant__ ElvaCudaSlopeArgs args) {
  const int64_t i = blockIdx.x;
  float* row = args.scores + i * args.width;
  const float inverse_temperature = static_cast<float>(1 / *args.temperature),
              peak = args.row_peak[i], factor = args.row_factor[i];
  for (int64_t j = threadIdx.x; j < args.width; j += kThreads) {
    const float score = row[j];
    float slope = 0;
    if (score > -INFINITY) {
      slope = factor * expf((score - peak) * inverse_temperature);
      if (args.column_peak != nullptr) {
        slope += args.column_factor[j] * expf((score - args.column_peak[j]) * inverse_temperature);
      }
    }
    row[j] = slope;
  }
  __syncthreads();
  add_target_slopes(args, args.target + i * args.positives, args.target_slope + i * args.positives,
                    row);
}

int64_t blocks_of(int64_t items, int64_t each) { return (items + each - 1) / each; }

}  // namespace
}  // namespace elva

extern "C" {

ElvaStatus elva_unit_rows_cuda(const ElvaCudaUnitArgs* args) {
  using namespace elva;
  return on_device(args->dtype, args->device, [args](auto element) {
    return launch(unit_rows<decltype(element)>, blocks_of(args->count, kWarps), 0, kThreads, 0,
                  args->stream, *args);
  });
}

ElvaStatus elva_unit_gradient_cuda(const ElvaCudaGradientArgs* args) {
  using namespace elva;
  return on_device(args->dtype, args->device, [args](auto element) {
    return launch(unit_gradient<decltype(element)>, blocks_of(args->count, kWarps), 0, kThreads, 0,
                  args->stream, *args);
  });
}

ElvaStatus elva_score_rows_cuda(const ElvaCudaScoreArgs* args) {
  using namespace elva;
  return on_device(ELVA_FP32, args->device, [args](auto) {
    return launch(score_rows, args->rows, 0, kThreads, sizeof(ScoreShared), args->stream, *args);
  });
}

int64_t elva_column_scratch_bytes_cuda(int64_t rows, int64_t width) {
  return elva::blocks_of(rows, elva::kPartRows) * width *
         static_cast<int64_t>(2 * sizeof(double) + sizeof(float));
}

ElvaStatus elva_column_sums_cuda(const ElvaCudaColumnArgs* args) {
  using namespace elva;
  return on_device(ELVA_FP32, args->device, [args](auto) {
    const int64_t parts = blocks_of(args->rows, kPartRows), count = parts * args->width;
    double* sum = static_cast<double*>(args->scratch);
    const ColumnArgs all{*args, parts, sum, sum + count, reinterpret_cast<float*>(sum + 2 * count)};
    const ElvaStatus status = launch(column_parts, blocks_of(args->width, kThreads) * parts, 0,
                                     kThreads, 0, args->stream, all);
    if (status != ELVA_OK) return status;
    return launch(column_sums, blocks_of(args->width, kColumns), 0, kColumns, 0, args->stream, all);
  });
}

ElvaStatus elva_slope_rows_cuda(const ElvaCudaSlopeArgs* args) {
  using namespace elva;
  return on_device(ELVA_FP32, args->device, [args](auto) {
    return launch(slope_rows, args->rows, 0, kThreads, 0, args->stream, *args);
  });
}

}  // extern "C"
