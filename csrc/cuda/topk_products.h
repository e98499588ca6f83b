// A block's rows of the corpus times a group of queries: the rows come through rings ahead of their
// use, the queries by pieces; scores of products leave, for topk.cu, or products, for codes.cu.
#ifndef ELVA_CUDA_TOPK_PRODUCTS_H_
#define ELVA_CUDA_TOPK_PRODUCTS_H_

#include "copies.h"
#include "multiply.h"
#include "rows.h"
#include "words.h"

namespace elva {

constexpr int kThreads = 256, kWarps = kThreads / 32, kWarpRows = 32;
constexpr int kBlockRows = kWarps * kWarpRows;
constexpr int64_t kSegment = 2048;                             // of a row that is summed apart
constexpr int kStageBytes = 128, kStages = 2;                  // of a row in the ring
constexpr int kRingBytes = kWarpRows * kStageBytes * kStages;  // a warp's

// What products of elements are summed in.
template <class T>
using Sum = std::conditional_t<sizeof(T) == 1, int32_t, float>;
// Whether a row's magnitude is asked for: 8-bit codes have one range, and a scale beside them.
template <class T>
constexpr bool kHasNorms = sizeof(T) > 1;

// Which 16 bytes of a row hold its `vector`th, in shared memory, where rows are multiples of 128
// bytes: of what eight lanes read of two neighbours, all are in different banks.
__device__ inline int swizzled(int row, int vector) { return vector ^ (row % 2 * 4); }

// A warp's 32 rows times a group's queries. Lane l has rows l / 4 + 8 r, r < 4, and of the columns
// those whose vector in a step of 64 bytes is the l % 4th.
template <class T, int kGroup>
class Tile {  // by matrix instructions on 16 rows, 8 queries and 32 bytes of columns
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
        for (int word = 0; word < 4; word += 2) {
          multiply_add(sum_[m][n], x[2 * m], x[2 * m + 1], q, word);
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
  Sum<T> sum_[2][kQueries / 8][4] = {};
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

inline int64_t rounded_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

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

// As row_exponent, by all lanes of a warp.
template <class T>
__device__ inline int warp_exponent(const Row<T>& row, int64_t dim) {
  float largest = 0;
  for (int64_t i = threadIdx.x % 32; i < dim; i += 32) {
    largest = fmaxf(largest, magnitude_of(row[i]));
  }
  return exponent_of(warp_max(largest));
}

// 0 for a zero row, NaN where not finite.
__device__ inline double inverse_norm(double norm) { return norm > 0 ? 1 / norm : norm; }

// x 2^-exponent, by two powers: one may be out of range.
template <class T>
__device__ inline Vector<T> rescaled(const Vector<T>& x, int exponent) {
  const float some = scalbnf(1.0f, -(exponent / 2)), rest = scalbnf(1.0f, exponent / 2 - exponent);
  Vector<T> out;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) narrow(widen(x.at[i]) * some * rest, out.at + i);
  return out;
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
#pragma unroll 1
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
      if constexpr (kHasNorms<T>) {
        if (exponent_ != nullptr) x = rescaled(x, scale_of(exponent_[row]));
      }
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
template <class T, int kGroup>
struct Results {
  Sum<T> dot[kGroup][kBlockRows + 4];  // what a warp writes at a time lies in different banks
  double inverse[kBlockRows];
};

template <class T, int kGroup>
struct Shared {
  union {
    struct {
      unsigned char ring[kWarps][kRingBytes];
      T pieces[2][kGroup * Tile<T, kGroup>::kPiece];  // of the queries, in use and next
    };
    Results<T, kGroup> results;
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
    square_ = 0;
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
#pragma unroll kSteps
        for (int step = 0; step < kColumns; step += kStep) {
          Vector<T> x[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            x[r] = ring.read(from + at, r, step / kSize);
            if constexpr (kHasNorms<T>) {
              float own[kSize];
              widen_all(x[r], own);
#pragma unroll
              for (int i = 0; i < kSize; ++i) squares[r] = fmaf(own[i], own[i], squares[r]);
            }
          }
          tile_.add(x, piece, (at + step) / kSize);
        }
        if constexpr (kHasNorms<T>) square_ += own_sum(squares);
        ring.fetch_after(from + at);
      }
    }
    wait_copies<0>();
  }

  // Whether a row is out of the range of products as they are; marks those.
  __device__ bool mark_far_rows() const {
    const bool far = !is_topk_range(square_);
    exponents()[own_row()] = far ? kUnread : 0;
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
      const int found = warp_exponent(corpus_row<T>(args_.topk, first_row_ + row), args_.topk.dim);
      __syncwarp();  // all have seen the mark
      if (threadIdx.x % 32 == 0) exponents()[row] = found;
      is_scaled = is_scaled || scale_of(found) != 0;
    }
    return __syncthreads_or(is_scaled) != 0;
  }

  // wanted(row): whether the scores of a row are written.
  template <class Wanted>
  __device__ void write(int64_t first_query, bool has_exponents, const Wanted& wanted) const {
    Results<T, kGroup>& results = shared_.results;
    const int lane = static_cast<int>(threadIdx.x % 32), own = static_cast<int>(threadIdx.x);
    const int quad = own / 32 * kWarpRows + lane / 4;
    __syncthreads();  // the ring and the piece have been read
    tile_.visit([&](int r, int n, float dot) { results.dot[n][quad + 8 * r] = dot; });
    results.inverse[own / 32 * kWarpRows + own_row()] = inverse_norm(sqrt(square_));
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

  // take(row, dots): of this thread's row, if there is one, dots(n) with the group's query n.
  template <class Take>
  __device__ void visit(const Take& take) const {
    const int own = static_cast<int>(threadIdx.x), quad = own / 32 * kWarpRows + own % 32 / 4;
    __syncthreads();  // the ring and the piece have been read
    tile_.visit([&](int r, int n, Sum<T> dot) { shared_.results.dot[n][quad + 8 * r] = dot; });
    __syncthreads();
    const int64_t row = first_row_ - own / 32 * kWarpRows + own;
    if (row < args_.topk.rows) take(row, [&](int n) { return shared_.results.dot[n][own]; });
  }

 private:
  static constexpr int kPiece = Tile<T, kGroup>::kPiece;
  static constexpr int kUnread = 2 * kNotFinite;  // no row's
  static constexpr int kSteps =
      sizeof(T) == 4 || kGroup > 32 ? 1 : 2;  // that registers suffice for

  // Of the warp's rows that whose square the lane has: one of the four that it multiplies.
  __device__ static int own_row() { return threadIdx.x % 32 / 4 + threadIdx.x % 4 * 8; }
  // Four lanes' sums of their four rows: each has that of one.
  __device__ static float own_sum(const float* rows) {
    const bool odd = threadIdx.x % 2 != 0, high = threadIdx.x % 4 >= 2;
    float pair[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float kept = odd ? rows[2 * i + 1] : rows[2 * i],
                  given = odd ? rows[2 * i] : rows[2 * i + 1];
      pair[i] = kept + __shfl_xor_sync(kAllLanes, given, 1);
    }
    return (high ? pair[1] : pair[0]) + __shfl_xor_sync(kAllLanes, high ? pair[0] : pair[1], 2);
  }
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
  double square_ = 0;
};

}  // namespace elva
#endif  // ELVA_CUDA_TOPK_PRODUCTS_H_
