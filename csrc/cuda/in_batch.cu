// What: the steps of the in-batch ops around the matrix products, which are torch's: unit rows,
//   statistics of rows of products, sums over columns, slopes in place, gradients on rows.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; cosine (8), negatives (9), rank (10),
//   log-sum-exp (11), contrastive losses (13) and (14) of elva_kernels.reference.
// In: rows in bf16, fp16 or fp32, any strides; products of unit rows [R, width] in fp32; targets,
//   ids.
// Out: see elva_in_batch.h; products become masked scores (-inf where a candidate is no negative),
//   then slopes.
// Work split: a warp a row of embeddings; a block a row of scores; a thread a column of 128 rows.
// Bytes: a row of scores is read twice (again from cache) and written once; a chunk's columns
//   once; slopes once each.
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

__global__ void __launch_bounds__(kThreads, 2)
    score_rows(const __grid_constant__ ElvaCudaScoreArgs args) {
  constexpr int kAtOnce = 4;
  ELVA_DYNAMIC_SHARED(memory);
  double* sums = reinterpret_cast<double*>(memory);
  float* bests = reinterpret_cast<float*>(sums + kWarps);
  int64_t* places = reinterpret_cast<int64_t*>(bests + kWarps);
  const int64_t i = blockIdx.x, own = args.target[i];
  float* row = args.scores + i * args.width;
  const double query = args.query_norm[2 * i], own_norm = args.candidate_inverse[own];
  const bool bad_query = isnan(query), bad = bad_query || isnan(own_norm);
  const float mine = bad ? 0.0f : clamped(row[own] * query * own_norm);
  const int64_t own_id = args.ids == nullptr ? own : args.ids[own];
  __syncthreads();  // the target's product is masked below
  int greater = 0, equal = 0;
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
      const bool rival =
          j < args.candidates && j != own && (args.ids == nullptr || args.ids[j] != own_id);
      if (rival) {
        const bool sound = !bad_query && !isnan(norms[r]);
        if (sound) {
          score = clamped(products[r] * query * norms[r]);
          if (static_cast<double>(score) > args.max_score) score = -INFINITY;
        }
        // NaN, a bad pair's own score, is below all numbers and equal to NaN.
        greater += score > -INFINITY && (bad || score > mine);
        equal += bad ? !sound : score > -INFINITY && score == mine;
      }
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
  const int all_greater = static_cast<int>(block_sum(static_cast<double>(greater), sums));
  const int all_equal = static_cast<int>(block_sum(static_cast<double>(equal), sums));
  if (threadIdx.x % 32 == 0) {
    bests[threadIdx.x / 32] = hardest;
    places[threadIdx.x / 32] = place;
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    if (bests[w] > -INFINITY && (place < 0 || is_before(bests[w], places[w], hardest, place))) {
      hardest = bests[w], place = places[w];
    }
  }
  if (threadIdx.x == 0) {
    args.n_greater[i] = all_greater;
    args.n_equal[i] = all_equal;
    args.target_score[i] = bad ? nanf("") : mine;
    args.hardest_score[i] = hardest;
    args.hardest_index[i] = place;
  }
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
  sum = block_sum(sum, sums);
  moment = block_sum(moment, sums);
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

__global__ void __launch_bounds__(kThreads, 2)
    slope_rows(const __grid_constant__ ElvaCudaSlopeArgs args) {
  const int64_t i = blockIdx.x, own = args.target[i];
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
    row[j] = j == own ? args.target_slope[i] : slope;
  }
}

int64_t blocks_of(int64_t items, int64_t each) { return (items + each - 1) / each; }

}  // namespace
}  // namespace elva

extern "C" {

ElvaStatus elva_unit_rows_cuda(const ElvaCudaUnitArgs* args) {
  using namespace elva;
  return on_device(args->dtype, args->device, [args](auto element) {
    return launch(unit_rows<decltype(element)>, blocks_of(args->count, kWarps), 1, kThreads, 0,
                  args->stream, *args);
  });
}

ElvaStatus elva_unit_gradient_cuda(const ElvaCudaGradientArgs* args) {
  using namespace elva;
  return on_device(args->dtype, args->device, [args](auto element) {
    return launch(unit_gradient<decltype(element)>, blocks_of(args->count, kWarps), 1, kThreads, 0,
                  args->stream, *args);
  });
}

ElvaStatus elva_score_rows_cuda(const ElvaCudaScoreArgs* args) {
  using namespace elva;
  return on_device(ELVA_FP32, args->device, [args](auto) {
    const size_t shared = kWarps * (sizeof(double) + sizeof(float) + sizeof(int64_t));
    return launch(score_rows, args->rows, 1, kThreads, shared, args->stream, *args);
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
    const ElvaStatus status = launch(column_parts, blocks_of(args->width, kThreads) * parts, 1,
                                     kThreads, 0, args->stream, all);
    if (status != ELVA_OK) return status;
    return launch(column_sums, blocks_of(args->width, kColumns), 1, kColumns, 0, args->stream, all);
  });
}

ElvaStatus elva_slope_rows_cuda(const ElvaCudaSlopeArgs* args) {
  using namespace elva;
  return on_device(ELVA_FP32, args->device, [args](auto) {
    return launch(slope_rows, args->rows, 1, kThreads, 0, args->stream, *args);
  });
}

}  // extern "C"
