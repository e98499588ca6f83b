// What: scores of topk: some queries against corpus rows, each row read once for up to 64 queries
//   (8 in fp32); where the caller multiplies, what makes scores of its products.
// Source: topk (15) of elva_kernels.reference; the best are chosen by select.cu.
// In: query [Q, D], corpus [P, D] in bf16, fp16 or fp32, any strides and any alignment (dense rows
//   on 16 bytes are copied ahead).
// Out: scores [Q, P] in fp32, cosines or dots; -inf where a row or its query is not finite.
// Work split: a block 256 rows and a group of queries, which pass by in pieces through shared
//   memory; a warp 32 rows, 128 bytes of each at a time through a ring of its own: in matrix
//   instructions in half precision, else in fp32 products.
// Bytes: the corpus once for each group of queries (from the second-level cache but for the first),
//   the scores written once; 8 KB a warp on their way.
// Numerics: products exact, sums in fp32 over the columns in one order whatever Q and P are;
//   squares by 64 in fp32, then in double; blocks with rows out of range once more, those rows
//   scaled by a power of two. No atomics: the same bits on every run.
// Limits: none; factors in half precision alone.
// Reference: elva_kernels.reference.topk.
#include "copies.h"
#include "multiply.h"
#include "rows.h"
#include "words.h"

namespace elva {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kWarpRows = 32;
constexpr int kBlockRows = kWarps * kWarpRows;
constexpr int64_t kSegment = 2048;                             // of a row that is summed apart
constexpr int kStageBytes = 128, kStages = 2;                  // of a row in the ring
constexpr int kRingBytes = kWarpRows * kStageBytes * kStages;  // a warp's

// Which 16 bytes of a row hold its `vector`th, in shared memory, where rows are multiples of 128
// bytes: of what eight lanes read of two neighbours, all are in different banks.
__device__ inline int swizzled(int row, int vector) { return vector ^ (row % 2 * 4); }

// A warp's 32 rows times a group's queries. Lane l has rows l / 4 + 8 r, r < 4, and of the columns
// those whose vector in a step of 64 bytes is the l % 4th.
template <class T, int kGroup>
class Tile {  // by matrix instructions on 16 rows, 8 queries and 16 columns
 public:
  static constexpr int kQueries = kGroup, kSize = Vector<T>::kSize;
  static constexpr int kPiece = (kGroup == 32 ? 512 : 256) / static_cast<int>(sizeof(T));

  // `piece` of the queries, [kQueries, kPiece], from its `vector`th on.
  __device__ void add(const Vector<T>* x, const T* piece, int vector) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
      const int query = n * 8 + lane / 4;
      const Vector<T> q =
          load16(piece + query * kPiece + swizzled(query, vector + lane % 4) * kSize);
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

template <int kGroup>
class Tile<float, kGroup> {  // each lane's columns first, then four lanes' sums
 public:
  static constexpr int kQueries = kGroup, kSize = 4, kPiece = 256;

  __device__ void add(const Vector<float>* x, const float* piece, int vector) {
    const int own = vector + static_cast<int>(threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < kQueries; ++n) {
      const Vector<float> q = load16(piece + n * kPiece + swizzled(n, own) * kSize);
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
constexpr int kFewQueries = sizeof(T) == 4 ? 8 : 32;
template <class T>
constexpr int kManyQueries = sizeof(T) == 4 ? 8 : 64;

int64_t rounded_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

struct TopkArgs {
  ElvaTopkScoresArgs topk;
  int64_t padded_dim;
  int64_t padded_queries;
  int64_t group;  // queries a block has at a time
  void* queries;  // [padded_queries, padded_dim], times 2^-exponent; zeros beyond the columns,
                  // anything beyond the queries
  // [padded_queries]: 1 / norm in units of 2^exponent, 0 for a zero row, NaN where not finite; the
  // exponent.
  double2* inverses;
};

// 0 for a zero row, NaN where not finite.
__device__ inline double inverse_of(double norm) { return norm > 0 ? 1 / norm : norm; }

// x 2^-exponent, by two powers: one may be out of range.
template <class T>
__device__ inline Vector<T> rescaled(const Vector<T>& x, int exponent) {
  const float some = scalbnf(1.0f, -(exponent / 2)), rest = scalbnf(1.0f, exponent / 2 - exponent);
  Vector<T> out;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) narrow(widen(x.at[i]) * some * rest, out.at + i);
  return out;
}

// A warp a query.
template <class T>
__global__ void __launch_bounds__(32, 16) topk_queries(const __grid_constant__ TopkArgs args) {
  constexpr int kSize = Vector<T>::kSize;
  const ElvaTopkScoresArgs& topk = args.topk;
  const int64_t q = blockIdx.x;
  T* out = static_cast<T*>(args.queries) + q * args.padded_dim;
  Row<T> row{static_cast<const T*>(topk.query.data) + q * topk.query.row_stride, topk.query.stride,
             0};
  const bool dense = row.is_dense();
  const double square = row_sums(row, row, topk.dim, kSegment).y;
  const double norm = norm_of(&row, square, topk.dim, kSegment);
#pragma unroll 4
  for (int64_t at = threadIdx.x * kSize; at < args.padded_dim; at += 32 * kSize) {
    Vector<T> x = isnan(norm) ? Vector<T>{} : row.packed(at, topk.dim, dense);
    if (row.exponent != 0) x = rescaled(x, row.exponent);
    store16(out + at, x);
  }
  if (threadIdx.x > 0) return;
  const double inverse = inverse_of(norm);
  args.inverses[q] = {inverse, static_cast<double>(row.exponent)};
  if (topk.row_factor == nullptr) return;
  const bool is_product = topk.metric == ELVA_DOT && !isnan(norm);
  topk.row_factor[q] = static_cast<float>(is_product ? scalbn(1.0, row.exponent) : inverse);
}

// Squares of rows whose products with queries near 1 are in range.
__device__ inline bool is_topk_range(double square) {
  return square >= 0x1p-100 && square <= 0x1p100;
}

__device__ inline float score_of(ElvaMetric metric, double dot, double2 query, double inverse,
                                 int exponent) {
  if (isnan(query.x) || isnan(inverse)) return -INFINITY;
  if (metric == ELVA_DOT) {
    const int both = exponent + static_cast<int>(query.y);
    return static_cast<float>(both == 0 ? dot : scalbn(dot, both)) + 0.0f;
  }
  const double score = dot * query.x * inverse;
  return static_cast<float>(score > 1 ? 1.0 : score < -1 ? -1.0 : score) + 0.0f;
}

// Beyond the last row, the last row again.
template <class T>
__device__ inline Row<T> corpus_row(const ElvaTopkScoresArgs& topk, int64_t row) {
  const int64_t there = row < topk.rows ? row : topk.rows - 1;
  return {static_cast<const T*>(topk.corpus.data) + there * topk.corpus.row_stride,
          topk.corpus.stride, 0};
}

template <class T>
__device__ inline bool is_dense(const ElvaTopkScoresArgs& topk) {
  constexpr int64_t kBytes = sizeof(T);
  return corpus_row<T>(topk, 0).is_dense() && topk.corpus.row_stride * kBytes % 16 == 0;
}

// A warp's rows, in stages of 128 bytes of each, which are on their way while others are in use.
template <class T>
class Ring {
 public:
  static constexpr int kSize = Vector<T>::kSize,
                       kColumns = kStageBytes / static_cast<int>(sizeof(T));

  // exponent: of the warp's rows, which are scaled by it; null: they are as they are.
  __device__ Ring(unsigned char* memory, const ElvaTopkScoresArgs& topk, int64_t first_row,
                  const int* exponent)
      : memory_(reinterpret_cast<T*>(memory)),
        topk_(topk),
        first_row_(first_row),
        rows_(first_row + kWarpRows < topk.rows ? kWarpRows
                                                : static_cast<int>(topk.rows - first_row)),
        exponent_(exponent),
        is_copied_(exponent == nullptr && is_dense<T>(topk)) {
    for (int stage = 0; stage < kStages; ++stage) fetch(stage * kColumns);
  }
  // Before columns from `from` on are read. On all lanes, as all that follows.
  __device__ void wait() const {
    wait_copies<kStages - 1>();
    __syncwarp();
  }
  __device__ Vector<T> read(int from, int r, int vector) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return elements<T>(words_at(place(from, lane / 4 + 8 * r, vector + lane % 4)));
  }
  // Columns from `from` on have been read.
  __device__ void fetch_after(int from) const {
    __syncwarp();
    fetch(from + kStages * kColumns);
  }

 private:
  static constexpr int kVectors = kStageBytes / 16, kTogether = 32 / kVectors;  // of a row; rows

  __device__ T* place(int from, int row, int vector) const {
    const int stage = from / kColumns % kStages;
    return memory_ + (stage * kWarpRows + row) * kColumns + swizzled(row, vector) * kSize;
  }
  // Zeros beyond the last column.
  __device__ void fetch(int from) const {
    const int lane = static_cast<int>(threadIdx.x % 32), row = lane / kVectors,
              vector = lane % kVectors, column = from + vector * kSize;
    if (from < topk_.dim) {
      if (is_copied_) {
        copy(place(from, row, vector), row, column);
      } else {
        move(place(from, row, vector), row, column);
      }
    }
    commit_copies();
  }
  // Of every row that is the lane's, `row` the first; beyond the last, one of those before it.
  __device__ void copy(T* to, int row, int column) const {
    const int left = static_cast<int>(topk_.dim) - column;
    const int bytes = (left > kSize ? kSize : left > 0 ? left : 0) * static_cast<int>(sizeof(T));
    const T* from = corpus_row<T>(topk_, first_row_ + row).data + (left > 0 ? column : 0);
#pragma unroll 4
    for (int i = 0; i < kWarpRows / kTogether; ++i) {
      copy16(to, from, bytes);
      to += kTogether * kColumns;
      row += kTogether;
      if (row < rows_) from += kTogether * topk_.corpus.row_stride;
    }
  }
  // The same of rows that are not dense, or that are scaled.
  __device__ void move(T* to, int row, int column) const {
    const bool dense = is_dense<T>(topk_);
#pragma unroll 1
    for (; row < kWarpRows; row += kTogether) {
      Vector<T> x = corpus_row<T>(topk_, first_row_ + row).packed(column, topk_.dim, dense);
      if (exponent_ != nullptr) x = rescaled(x, scale_of(exponent_[row]));
      store16_shared(to, x);
      to += kTogether * kColumns;
    }
  }

  T* memory_;
  const ElvaTopkScoresArgs& topk_;
  int64_t first_row_;
  int rows_;  // of the corpus from there on, as far as the warp has them
  const int* exponent_;
  bool is_copied_;
};

// A group's products when the last column has been read.
template <int kGroup>
struct Results {
  float dot[kGroup][kBlockRows + 4];  // what a warp writes at a time lies in different banks
  double inverse[kBlockRows];
};

template <class T, int kGroup>
struct Shared {
  union {
    struct {
      unsigned char ring[kWarps][kRingBytes];
      T pieces[2][kGroup * Tile<T, kGroup>::kPiece];  // of the queries, in use and next
    };
    Results<kGroup> results;
  };
  int exponent[kBlockRows];
};

// A block's rows times a group of queries. Every function is called by all its threads.
template <class T, int kGroup>
class Products {
 public:
  __device__ Products(const TopkArgs& args, int64_t first_row, unsigned char* memory)
      : args_(args),
        shared_(*reinterpret_cast<Shared<T, kGroup>*>(memory)),
        first_row_(first_row + threadIdx.x / 32 * kWarpRows) {}

  // Of the rows as they are, or scaled by the exponents that have been read.
  __device__ void multiply(int64_t first_query, bool is_scaled) {
    constexpr int kSize = Vector<T>::kSize, kStep = 4 * kSize, kColumns = Ring<T>::kColumns;
    const int dim = static_cast<int>(args_.topk.dim);
    read_queries(first_query, 0);  // they are there when the ring's first stage is
    const Ring<T> ring(shared_.ring[threadIdx.x / 32], args_.topk, first_row_,
                       is_scaled ? exponents() : nullptr);
    tile_ = Tile<T, kGroup>();
#pragma unroll
    for (int r = 0; r < 4; ++r) square_[r] = 0;
#pragma unroll 1
    for (int from = 0; from < dim; from += kPiece) {
      ring.wait();
      __syncthreads();  // all have this piece, and are done with the one before
      if (from + kPiece < dim) read_queries(first_query, from + kPiece);
      const T* piece = shared_.pieces[from / kPiece % 2];
#pragma unroll 1
      for (int at = 0; at < kPiece && from + at < dim; at += kColumns) {
        float squares[4] = {};
        ring.wait();
#pragma unroll sizeof(T) == 4 ? 1 : 2  // two steps of floats are more than there are registers for
        for (int step = 0; step < kColumns; step += kStep) {
          Vector<T> x[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            x[r] = ring.read(from + at, r, step / kSize);
            float own[kSize];
            widen_all(x[r], own);
#pragma unroll
            for (int i = 0; i < kSize; ++i) squares[r] = fmaf(own[i], own[i], squares[r]);
          }
          tile_.add(x, piece, (at + step) / kSize);
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) square_[r] += squares[r];
        ring.fetch_after(from + at);
      }
    }
    wait_copies<0>();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      square_[r] += __shfl_xor_sync(kAllLanes, square_[r], 1);
      square_[r] += __shfl_xor_sync(kAllLanes, square_[r], 2);
    }
  }

  // Whether a row is out of the range of products as they are; marks those.
  __device__ bool mark_far_rows() const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    bool far = false;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const bool own = !is_topk_range(square_[r]);
      if (lane % 4 == 0) exponents()[lane / 4 + 8 * r] = own ? kUnread : 0;
      far = far || own;
    }
    return __syncthreads_or(far) != 0;
  }
  // In the place of this thread's number. Before read_exponents.
  __device__ void mark(bool far) const {
    shared_.exponent[threadIdx.x] = far ? kUnread : 0;
    __syncthreads();
  }

  // Of the marked rows; whether one of them has to be scaled.
  __device__ bool read_exponents() const {
    bool is_scaled = false;
#pragma unroll 1
    for (int row = 0; row < kWarpRows; ++row) {
      if (exponents()[row] != kUnread) continue;
      const int found = row_exponent(corpus_row<T>(args_.topk, first_row_ + row), args_.topk.dim);
      if (threadIdx.x % 32 == 0) exponents()[row] = found;
      is_scaled = is_scaled || scale_of(found) != 0;
    }
    return __syncthreads_or(is_scaled) != 0;
  }

  // wanted(row): whether the scores of a row are written.
  template <class Wanted>
  __device__ void write(int64_t first_query, bool has_exponents, const Wanted& wanted) const {
    Results<kGroup>& results = shared_.results;
    const int lane = static_cast<int>(threadIdx.x % 32), own = static_cast<int>(threadIdx.x);
    const int quad = own / 32 * kWarpRows + lane / 4;
    __syncthreads();  // the ring and the piece have been read
    tile_.visit([&](int r, int n, float dot) { results.dot[n][quad + 8 * r] = dot; });
    if (lane % 4 == 0) {
#pragma unroll
      for (int r = 0; r < 4; ++r) results.inverse[quad + 8 * r] = inverse_of(sqrt(square_[r]));
    }
    __syncthreads();
    const ElvaTopkScoresArgs& topk = args_.topk;
    const int64_t row = first_row_ - own / 32 * kWarpRows + own;
    if (row < topk.rows && wanted(row)) {
      const int exponent = has_exponents ? shared_.exponent[own] : 0;
      const double inverse = exponent == kNotFinite ? nan("")
                             : exponent == kZero    ? 0
                                                    : results.inverse[own];
      float* scores = topk.scores + first_query * topk.rows + row;
#pragma unroll 1
      for (int n = 0; n < kGroup && first_query + n < topk.queries; ++n) {
        scores[n * topk.rows] =
            score_of(topk.metric, results.dot[n][own], args_.inverses[first_query + n], inverse,
                     scale_of(exponent));
      }
    }
    __syncthreads();  // before the ring is filled again
  }

 private:
  static constexpr int kPiece = Tile<T, kGroup>::kPiece;
  static constexpr int kUnread = 2 * kNotFinite;  // no row's

  __device__ int* exponents() const { return shared_.exponent + threadIdx.x / 32 * kWarpRows; }

  // The piece from `from` on begins its way, with what is committed next.
  __device__ void read_queries(int64_t first_query, int from) const {
    constexpr int kSize = Vector<T>::kSize, kVectors = kPiece / kSize;
    const T* queries = static_cast<const T*>(args_.queries) + first_query * args_.padded_dim + from;
    T* piece = shared_.pieces[from / kPiece % 2];
    const int64_t left = args_.topk.queries - first_query;
    const int count = (left < kGroup ? static_cast<int>(left) : kGroup) * kVectors;
#pragma unroll 1
    for (int v = static_cast<int>(threadIdx.x); v < count; v += kThreads) {
      const int query = v / kVectors, vector = v % kVectors;
      copy16(piece + query * kPiece + swizzled(query, vector) * kSize,
             queries + query * args_.padded_dim + vector * kSize);
    }
  }

  const TopkArgs& args_;
  Shared<T, kGroup>& shared_;
  int64_t first_row_;  // of the warp
  Tile<T, kGroup> tile_;
  double square_[4] = {};
};

// Blocks whose memory a multiprocessor holds; more queries take the registers of two.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int kBlocks = 1;
#else
constexpr int kBlocks = 2;
#endif
template <int kGroup>
constexpr int kBlocksOf = kGroup > 32 ? 1 : kBlocks;

template <class T, int kGroup>
__global__ void __launch_bounds__(kThreads, kBlocksOf<kGroup>)
    topk_scores(const __grid_constant__ TopkArgs args) {
  ELVA_DYNAMIC_SHARED(memory);
  const int64_t groups = args.padded_queries / kGroup, first_query = blockIdx.x % groups * kGroup;
  Products<T, kGroup> products(args, blockIdx.x / groups * kBlockRows, memory);
  bool is_scaled = false, has_exponents = false;
#pragma unroll 1
  while (true) {
    products.multiply(first_query, is_scaled);
    if (is_scaled || !products.mark_far_rows()) break;
    has_exponents = true;
    is_scaled = products.read_exponents();
    if (!is_scaled) break;
  }
  products.write(first_query, has_exponents, [](int64_t) { return true; });
}

// A warp 32 rows, one after the other.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    topk_row_factors(const __grid_constant__ TopkArgs args) {
  constexpr int kSize = Vector<T>::kSize, kAtOnce = 4;
  const ElvaTopkScoresArgs& topk = args.topk;
  const int64_t first = int64_t{blockIdx.x} * kBlockRows + threadIdx.x / 32 * kWarpRows;
  const int64_t last = first + kWarpRows < topk.rows ? first + kWarpRows : topk.rows;
#pragma unroll 1
  for (int64_t i = first; i < last; ++i) {
    const Row<T> row{static_cast<const T*>(topk.corpus.data) + i * topk.corpus.row_stride,
                     topk.corpus.stride, 0};
    const bool dense = row.is_dense();
    double square = 0;
#pragma unroll 1
    for (int64_t at = threadIdx.x % 32 * kSize; at < topk.dim; at += kAtOnce * 32 * kSize) {
      Words held[kAtOnce];
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v) {
        const Vector<T> x = row.packed(at + v * 32 * kSize, topk.dim, dense);
        memcpy(held + v, &x, sizeof(x));
      }
      float squares[2] = {};
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v) {
        const Vector<T> x = elements<T>(held[v]);
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          squares[e % 2] = fmaf(widen(x.at[e]), widen(x.at[e]), squares[e % 2]);
        }
      }
      square += squares[0] + squares[1];
    }
    square = warp_sum(square);
    double factor = topk.metric == ELVA_COSINE ? 1 / sqrt(square) : 1.0;
    if (!is_topk_range(square)) {
      const bool is_zero = row_exponent(row, topk.dim) == kZero;
      factor = !is_zero ? -1 : topk.metric == ELVA_COSINE ? 0 : 1;
    }
    if (threadIdx.x % 32 == 0) topk.column_factor[i] = static_cast<float>(factor);
  }
}

// A block 256 rows: of those out of range or not finite, the scores with all queries.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    topk_far_scores(const __grid_constant__ TopkArgs args) {
  constexpr int kGroup = kFewQueries<T>;
  ELVA_DYNAMIC_SHARED(memory);
  const ElvaTopkScoresArgs& topk = args.topk;
  const int64_t first_row = int64_t{blockIdx.x} * kBlockRows, own = first_row + threadIdx.x;
  if (__syncthreads_or(own < topk.rows && topk.column_factor[own] < 0) == 0) return;
  Products<T, kGroup> products(args, first_row, memory);
  products.mark(own < topk.rows && topk.column_factor[own] < 0);
  const bool is_scaled = products.read_exponents();
#pragma unroll 1
  for (int64_t first_query = 0; first_query < topk.queries; first_query += kGroup) {
    if (is_scaled) products.multiply(first_query, true);  // else none is finite
    products.write(first_query, true, [&](int64_t row) { return topk.column_factor[row] < 0; });
  }
}

// Lays out the scratch, of which the bytes are given back.
template <class T>
int64_t pad(const ElvaTopkScoresArgs& topk, TopkArgs* args) {
  constexpr int64_t kMostPiece = 1024 / static_cast<int64_t>(sizeof(T));
  args->topk = topk;
  args->group = topk.queries > kFewQueries<T> ? kManyQueries<T> : kFewQueries<T>;
  args->padded_dim = rounded_up(topk.dim, kMostPiece);
  args->padded_queries = rounded_up(topk.queries, args->group);
  const int64_t queries = args->padded_queries * args->padded_dim * static_cast<int64_t>(sizeof(T));
  unsigned char* scratch = static_cast<unsigned char*>(topk.scratch);
  args->queries = scratch;
  args->inverses = reinterpret_cast<double2*>(scratch + queries);
  return queries + args->padded_queries * static_cast<int64_t>(sizeof(double2));
}

template <class T>
ElvaStatus launch_queries(const TopkArgs& args) {
  return launch(topk_queries<T>, args.topk.queries, 0, 32, 0, args.topk.stream, args);
}

int64_t row_blocks(const ElvaTopkScoresArgs& topk) {
  return (topk.rows + kBlockRows - 1) / kBlockRows;
}

template <class T, int kGroup>
ElvaStatus launch_scores(const TopkArgs& args) {
  return launch(topk_scores<T, kGroup>, row_blocks(args.topk) * (args.padded_queries / kGroup), 0,
                kThreads, sizeof(Shared<T, kGroup>), args.topk.stream, args);
}

template <class T>
ElvaStatus scores(const ElvaTopkScoresArgs& topk) {
  TopkArgs args;
  pad<T>(topk, &args);
  const ElvaStatus status = launch_queries<T>(args);
  if (status != ELVA_OK) return status;
  return args.group == kFewQueries<T> ? launch_scores<T, kFewQueries<T>>(args)
                                      : launch_scores<T, kManyQueries<T>>(args);
}

template <class T>
ElvaStatus factors(const ElvaTopkScoresArgs& topk) {
  TopkArgs args;
  pad<T>(topk, &args);
  const ElvaStatus status = launch_queries<T>(args);
  if (status != ELVA_OK) return status;
  return launch(topk_row_factors<T>, row_blocks(topk), 0, kThreads, 0, topk.stream, args);
}

template <class T>
ElvaStatus far_scores(const ElvaTopkScoresArgs& topk) {
  TopkArgs args;
  pad<T>(topk, &args);
  return launch(topk_far_scores<T>, row_blocks(topk), 0, kThreads,
                sizeof(Shared<T, kFewQueries<T>>), topk.stream, args);
}

}  // namespace
}  // namespace elva

extern "C" {

int64_t elva_topk_scratch_bytes_cuda(const ElvaTopkScoresArgs* args, int64_t* padded_dim) {
  elva::TopkArgs all;
  const int64_t bytes =
      args->dtype == ELVA_FP32 ? elva::pad<float>(*args, &all) : elva::pad<elva::Bf16>(*args, &all);
  *padded_dim = all.padded_dim;
  return bytes;
}

ElvaStatus elva_topk_scores_cuda(const ElvaTopkScoresArgs* args) {
  return elva::on_device(args->dtype, args->device,
                         [args](auto element) { return elva::scores<decltype(element)>(*args); });
}

ElvaStatus elva_topk_factors_cuda(const ElvaTopkScoresArgs* args) {
  return elva::on_device(args->dtype, args->device, [args](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) return elva::factors<T>(*args);
    return ELVA_UNSUPPORTED;
  });
}

ElvaStatus elva_topk_far_cuda(const ElvaTopkScoresArgs* args) {
  return elva::on_device(args->dtype, args->device, [args](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) return elva::far_scores<T>(*args);
    return ELVA_UNSUPPORTED;
  });
}

}  // extern "C"
