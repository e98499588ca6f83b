// What: scores of topk: some queries against a block of corpus rows, each row read once for up to
//   32 queries (8 in fp32).
// Source: topk (15) of elva_kernels.reference; the best are chosen by the caller.
// In: query [Q, D], corpus [P, D] in bf16, fp16 or fp32, any strides and any alignment (dense rows
//   on 16 bytes are read in vectors).
// Out: scores [Q, P] in fp32, cosines or dots; -inf where a row or its query is not finite.
// Work split: a block 256 rows and a group of queries, which pass by in pieces of 512 bytes through
//   shared memory; a warp 32 rows: in matrix instructions in half precision, else in fp32 products.
// Bytes: the corpus once for each group of queries (from the second-level cache but for the first),
//   the scores written once.
// Numerics: products exact, sums in fp32 over the columns in one order whatever Q and P are;
//   squares by 64 in fp32, then in double; blocks with rows out of range once more, those rows
//   scaled by a power of two. No atomics: the same bits on every run.
// Limits: none.
// Reference: elva_kernels.reference.topk.
#include "multiply.h"
#include "rows.h"
#include "words.h"

namespace elva {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kWarpRows = 32;
constexpr int kBlockRows = kWarps * kWarpRows;
constexpr int64_t kSegment = 2048;  // of a row that is summed apart
// Of a query in shared memory at a time; with the padding, 8 queries lie in different banks.
constexpr int kPieceBytes = 512, kPaddingBytes = 64;
constexpr int kAhead = 2;  // steps of 64 bytes of a row that are on their way at a time

// A warp's 32 rows times a group's queries. Lane l has rows l / 4 + 8 r, r < 4, and of the columns
// those whose vector in a step of 64 bytes is the l % 4th.
template <class T>
class Tile {  // by matrix instructions on 16 rows, 8 queries and 16 columns
 public:
  static constexpr int kQueries = 32, kSize = Vector<T>::kSize;

  __device__ void add(const Vector<T>* x, const T* queries, int stride) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
      const Vector<T> q = load16(queries + (n * 8 + lane / 4) * stride + lane % 4 * kSize);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < kSize; half += 4) {
          multiply_add<T>(sum_[m][n], x[2 * m], x[2 * m + 1], q, half);
        }
      }
    }
  }

  // take(r, query, value) of each of this lane's results; row r of its four.
  template <class Take>
  __device__ void visit(const Take& take) const {
    const int column = static_cast<int>(threadIdx.x % 4) * 2;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) take(2 * m + i / 2, n * 8 + column + i % 2, sum_[m][n][i]);
      }
    }
  }

 private:
  float sum_[2][kQueries / 8][4] = {};
};

template <>
class Tile<float> {  // each lane's columns first, then four lanes' sums
 public:
  static constexpr int kQueries = 8, kSize = 4;

  __device__ void add(const Vector<float>* x, const float* queries, int stride) {
    const int column = static_cast<int>(threadIdx.x % 4) * kSize;
#pragma unroll
    for (int n = 0; n < kQueries; ++n) {
      const Vector<float> q = load16(queries + n * stride + column);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) sum_[r][n] = fmaf(x[r].at[i], q.at[i], sum_[r][n]);
      }
    }
  }

  template <class Take>
  __device__ void visit(const Take& take) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int n = 0; n < kQueries; ++n) {
        float sum = sum_[r][n];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (static_cast<int>(threadIdx.x % 4) == n % 4) take(r, n, sum);
      }
    }
  }

 private:
  float sum_[4][kQueries] = {};
};

template <class T>
constexpr int kPiece = kPieceBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kStride = (kPieceBytes + kPaddingBytes) / static_cast<int>(sizeof(T));

int64_t rounded_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

struct TopkArgs {
  ElvaTopkScoresArgs topk;
  int64_t padded_dim;
  int64_t padded_queries;
  void* queries;  // [padded_queries, padded_dim], times 2^-exponent; zeros beyond
  int32_t* far;   // [blocks]: whether one of its rows is out of range
  int64_t blocks;
  double2* norms;  // [padded_queries]: in units of 2^exponent, NaN where not finite; the exponent
};

// A warp a query.
template <class T>
__global__ void __launch_bounds__(32, 16) topk_queries(const __grid_constant__ TopkArgs args) {
  const int64_t q = blockIdx.x;
  T* out = static_cast<T*>(args.queries) + q * args.padded_dim;
  double norm = 0;
  Row<T> row{static_cast<const T*>(args.topk.query.data), args.topk.query.stride, 0};
  if (q < args.topk.queries) {
    row.data += q * args.topk.query.row_stride;
    const double square = row_sums(row, row, args.topk.dim, kSegment).y;
    norm = norm_of(&row, square, args.topk.dim, kSegment);
  }
  const bool there = q < args.topk.queries && !isnan(norm);
  for (int64_t i = threadIdx.x; i < args.padded_dim; i += 32) {
    narrow(there && i < args.topk.dim ? row[i] : 0.0f, out + i);
  }
  if (threadIdx.x == 0) args.norms[q] = {norm, static_cast<double>(row.exponent)};
}

// Squares of rows whose products with queries near 1 are in range.
__device__ inline bool is_topk_range(double square) {
  return square >= 0x1p-100 && square <= 0x1p100;
}

__device__ inline float score_of(ElvaMetric metric, double dot, double2 query, double norm,
                                 int exponent) {
  if (isnan(query.x) || isnan(norm)) return -INFINITY;
  if (metric == ELVA_DOT) {
    return static_cast<float>(scalbn(dot, exponent + static_cast<int>(query.y))) + 0.0f;
  }
  if (!(query.x > 0) || !(norm > 0)) return 0;
  const double score = dot / (query.x * norm);
  return static_cast<float>(score > 1 ? 1.0 : score < -1 ? -1.0 : score) + 0.0f;
}

// x 2^-exponent, by two powers: one may be out of range.
template <class T>
__device__ inline Vector<T> rescaled(const Vector<T>& x, int exponent) {
  const float some = scalbnf(1.0f, -(exponent / 2)), rest = scalbnf(1.0f, exponent / 2 - exponent);
  Vector<T> out;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) narrow(widen(x.at[i]) * some * rest, out.at + i);
  return out;
}

// Where kRescale, again for the blocks that found a row out of range, such rows at their exponents.
template <class T, bool kRescale>
__global__ void __launch_bounds__(kThreads, kRescale ? 1 : 2)
    topk_scores(const __grid_constant__ TopkArgs args) {
  constexpr int kQueries = Tile<T>::kQueries, kSize = Vector<T>::kSize, kStep = 4 * kSize;
  if (kRescale && args.far[blockIdx.x] == 0) return;
  ELVA_DYNAMIC_SHARED(memory);
  T* piece = reinterpret_cast<T*>(memory);
  const ElvaTopkScoresArgs& topk = args.topk;
  const int64_t groups = args.padded_queries / kQueries;
  const int64_t first_query = blockIdx.x % groups * kQueries;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t first_row =
      blockIdx.x / groups * kBlockRows + static_cast<int64_t>(threadIdx.x / 32) * kWarpRows;
  const T* queries = static_cast<const T*>(args.queries) + first_query * args.padded_dim;
  // Beyond the last row, the last row again.
  const auto row_at = [&](int64_t at) {
    const int64_t there = at < topk.rows ? at : topk.rows - 1;
    return Row<T>{static_cast<const T*>(topk.corpus.data) + there * topk.corpus.row_stride,
                  topk.corpus.stride, 0};
  };
  constexpr int64_t kBytes = sizeof(T);
  const bool dense = row_at(0).is_dense() && topk.corpus.row_stride * kBytes % 16 == 0;
  Row<T> rows[4];
  int exponent[4] = {};
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    rows[r] = row_at(first_row + lane / 4 + 8 * r);
    if (kRescale) {
      for (int quad = 0; quad < 8; ++quad) {
        const Row<T> row = row_at(first_row + quad + 8 * r);
        const int found = row_exponent(row, topk.dim);
        if (lane / 4 == quad) exponent[r] = found;
      }
    }
  }

  Tile<T> tile;
  double square[4] = {};
  float squares[4];
  const auto take = [&](const Vector<T>* x, int at) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float own = widen(x[r].at[i]);
        squares[r] = fmaf(own, own, squares[r]);
      }
    }
    tile.add(x, piece + at, kStride<T>);
  };
  // The steps before `whole` are in vectors, which are read kAhead steps before they are taken.
  const int64_t whole = dense && !kRescale ? topk.dim / (kAhead * kStep) * (kAhead * kStep) : 0;
  Words ahead[kAhead][4];
  const auto read_ahead = [&](int step, int64_t at) {
#pragma unroll
    for (int r = 0; r < 4; ++r) ahead[step][r] = words_at(rows[r].data + at + lane % 4 * kSize);
  };
  if (whole > 0) {
#pragma unroll
    for (int step = 0; step < kAhead; ++step) read_ahead(step, step * kStep);
  }
#pragma unroll 1
  for (int64_t from = 0; from < topk.dim; from += kPiece<T>) {
    __syncthreads();
#pragma unroll 1
    for (int v = static_cast<int>(threadIdx.x); v < kQueries * kPiece<T> / kSize; v += kThreads) {
      const int query = v / (kPiece<T> / kSize), at = v % (kPiece<T> / kSize) * kSize;
      store16_shared(piece + query * kStride<T> + at,
                     load16(queries + query * args.padded_dim + from + at));
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 4; ++r) squares[r] = 0;
    int at = 0;
#pragma unroll 1
    for (; at < kPiece<T> && from + at < whole; at += kAhead * kStep) {
#pragma unroll
      for (int step = 0; step < kAhead; ++step) {
        Vector<T> x[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) x[r] = elements<T>(ahead[step][r]);
        take(x, at + step * kStep);
        const int64_t next = from + at + (step + kAhead) * kStep;
        if (next < whole) read_ahead(step, next);
      }
    }
    if (at < kPiece<T> && from + at < topk.dim) {
#pragma unroll 1
      for (; at < kPiece<T> && from + at < topk.dim; at += kStep) {
        Vector<T> x[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          x[r] = rows[r].packed(from + at + lane % 4 * kSize, topk.dim, dense);
          if (kRescale) x[r] = rescaled(x[r], scale_of(exponent[r]));
        }
        take(x, at);
      }
      // No vectors wait any more: their registers are free above.
#pragma unroll
      for (auto& step : ahead) {
#pragma unroll
        for (Words& words : step) words = {};
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) square[r] += squares[r];
  }

  bool far = false;
  double norm[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    square[r] += __shfl_xor_sync(kAllLanes, square[r], 1);
    square[r] += __shfl_xor_sync(kAllLanes, square[r], 2);
    far = far || !is_topk_range(square[r]);
    norm[r] = exponent[r] == kNotFinite ? nan("") : exponent[r] == kZero ? 0 : sqrt(square[r]);
  }
  if (!kRescale) {
    far = __syncthreads_or(far) != 0;
    if (threadIdx.x == 0) args.far[blockIdx.x] = far ? 1 : 0;
  }
  float* scores = static_cast<float*>(topk.scores);
  tile.visit([&](int r, int n, float dot) {
    const int64_t row = first_row + lane / 4 + 8 * r, query = first_query + n;
    if (row >= topk.rows || query >= topk.queries) return;
    scores[query * topk.rows + row] =
        score_of(topk.metric, dot, args.norms[query], norm[r], scale_of(exponent[r]));
  });
}

// Lays out the scratch, of which the bytes are given back.
template <class T>
int64_t pad(const ElvaTopkScoresArgs& topk, TopkArgs* args) {
  args->topk = topk;
  args->padded_dim = rounded_up(topk.dim, kPiece<T>);
  args->padded_queries = rounded_up(topk.queries, Tile<T>::kQueries);
  args->blocks =
      (topk.rows + kBlockRows - 1) / kBlockRows * (args->padded_queries / Tile<T>::kQueries);
  const int64_t norms = args->padded_queries * static_cast<int64_t>(sizeof(double2)),
                queries = args->padded_queries * args->padded_dim * static_cast<int64_t>(sizeof(T));
  unsigned char* scratch = static_cast<unsigned char*>(topk.scratch);
  args->norms = reinterpret_cast<double2*>(scratch);
  args->queries = scratch + norms;
  args->far = reinterpret_cast<int32_t*>(scratch + norms + queries);
  return norms + queries + args->blocks * static_cast<int64_t>(sizeof(int32_t));
}

template <class T>
ElvaStatus run(const ElvaTopkScoresArgs& topk) {
  TopkArgs args;
  pad<T>(topk, &args);
  constexpr size_t kShared = static_cast<size_t>(Tile<T>::kQueries) * (kPieceBytes + kPaddingBytes);
  ElvaStatus status = launch(topk_queries<T>, args.padded_queries, 0, 32, 0, topk.stream, args);
  if (status != ELVA_OK) return status;
  status = launch(topk_scores<T, false>, args.blocks, 0, kThreads, kShared, topk.stream, args);
  if (status != ELVA_OK) return status;
  return launch(topk_scores<T, true>, args.blocks, 0, kThreads, kShared, topk.stream, args);
}

}  // namespace
}  // namespace elva

extern "C" {

int64_t elva_topk_scratch_bytes_cuda(const ElvaTopkScoresArgs* args) {
  elva::TopkArgs all;
  return args->dtype == ELVA_FP32 ? elva::pad<float>(*args, &all)
                                  : elva::pad<elva::Bf16>(*args, &all);
}

ElvaStatus elva_topk_scores_cuda(const ElvaTopkScoresArgs* args) {
  return elva::on_device(args->dtype, args->device,
                         [args](auto element) { return elva::run<decltype(element)>(*args); });
}

}  // extern "C"
