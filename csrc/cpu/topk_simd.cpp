// What: the inner loop of topk: dots of a tile of queries with a block of corpus rows, and the
//   rows' squared norms.
// Source: topk (15) of elva_kernels.reference.
// In: dense rows [dim] and zero-padded queries of bf16, fp16, fp32 or fp64.
// Out: double dots and squares.
// Work split: the caller's thread, one job; 4 rows x 1 to 4 queries in registers a pass.
// Bytes: the rows once from memory in the job that also squares them, from the second-level cache
//   in the others.
// Numerics: 16 float lanes (8 double ones for fp64), at most kChain steps in each before their tree
//   sum goes to a double: at most 2 * 64 + 4 rounded additions of a float, so a cosine is within
//   132 * 2^-24 = 7.9e-6 of the truth whatever the rows are, and within 2e-7 as a rule. vdpbf16ps
//   as in reward_simd.cpp. A dot's lanes and trees are the same in every tile: its bits depend on
//   its row and query alone.
// Limits: finite rows with squared norms in the range of rescale.h; others give a square out of it.
//   Compiled once per CPU level, with ELVA_LEVEL set; nothing here has external linkage but the
//   table at the end.
// Reference: elva_kernels.reference.topk.
#include "kernels.h"
#include "simd_dots.h"

namespace elva {
namespace {

constexpr int64_t kChain = 64;
// As many sums as the level's registers hold beside the elements that they take.
constexpr int kTileRows = ELVA_LEVEL >= ELVA_LEVEL_AVX512 ? 4 : 2;
constexpr int kTileQueries = ELVA_LEVEL >= ELVA_LEVEL_AVX512 ? 4 : 2;

// The running sums of C queries x R rows, then of R squares; whole fours for add_sums.
template <class T, int C, int R, bool kSquares>
struct Tile {
  using D = DotsFor<T>;
  using V = typename D::V;
  using Element = typename D::Element;
  static constexpr int kSums = C * R + (kSquares ? R : 0);
  static constexpr int kVectors = (kSums + 3) / 4 * 4;
  V vectors[kVectors];
  double sums[kVectors] = {};

  void clear() {
    // In fours, since the compiler unrolls no loop of 20, and an array that is indexed by a
    // variable stays in memory.
    for (int k = 0; k < kVectors; k += 4) {
      for (int j = 0; j < 4; ++j) vectors[k + j] = V::zero();
    }
  }
  void step(const T* const* queries, int64_t i, const Element* rows) {
    for (int c = 0; c < C; ++c) {
      const Element q = D::load(queries[c] + i);
      for (int r = 0; r < R; ++r)
        vectors[c * R + r] = D::accumulate(vectors[c * R + r], rows[r], q);
    }
    if constexpr (kSquares) {
      for (int r = 0; r < R; ++r)
        vectors[C * R + r] = D::accumulate(vectors[C * R + r], rows[r], rows[r]);
    }
  }
  void flush() {
    for (int k = 0; k < kVectors; k += 4) add_sums(vectors + k, sums + k);
  }
};

// dot[c * stride + r] of C queries x R rows.
template <class T, int C, int R, bool kSquares>
void scan_tile(const T* const* query_pointers, const T* const* row_pointers, int64_t dim,
               int64_t stride, double* dot, double* square) {
  using D = DotsFor<T>;
  // Copies, since a vector store may alias anything that is reached through a pointer.
  const T *queries[C], *rows[R], *ahead[R];
  for (int c = 0; c < C; ++c) queries[c] = query_pointers[c];
  for (int r = 0; r < R; ++r) {
    rows[r] = row_pointers[r];
    ahead[r] = row_pointers[r + kScanAhead];
  }
  Tile<T, C, R, kSquares> tile;
  const int64_t whole = dim - dim % D::kStep;
  for (int64_t i = 0; i < dim;) {
    tile.clear();
    const int64_t chain = i + kChain * D::kStep;
    const int64_t end = chain < whole ? chain : whole;
    for (; i < end; i += D::kStep) {
      typename D::Element elements[R];
      for (int r = 0; r < R; ++r) {
        elements[r] = D::load(rows[r] + i);
        if constexpr (kSquares) prefetch_far(ahead[r] + i);
      }
      tile.step(queries, i, elements);
    }
    if (i == whole && i < dim) {
      typename D::Element elements[R];
      for (int r = 0; r < R; ++r) elements[r] = D::load(rows[r] + i, dim - i);
      tile.step(queries, i, elements);
      i = dim;
    }
    tile.flush();
  }
  for (int c = 0; c < C; ++c) {
    for (int r = 0; r < R; ++r) dot[c * stride + r] = tile.sums[c * R + r];
  }
  if constexpr (kSquares) {
    for (int r = 0; r < R; ++r) square[r] = tile.sums[C * R + r];
  }
}

template <class T, int C>
void scan_block(const ScanJob& job, int64_t first) {
  const T* const* queries = reinterpret_cast<const T* const*>(job.queries) + first;
  const T* const* rows = reinterpret_cast<const T* const*>(job.rows);
  const int64_t n = job.count;
  double* dot = job.dot + first * n;
  for (int64_t i = 0; i < n; i += kTileRows) {
    for (int64_t r = 0; first == 0 && r < kTileRows; ++r) {
      const char* next = static_cast<const char*>(job.next[i + r]);
      for (int64_t at = job.next_begin; at < job.next_end; at += 64) prefetch_far(next + at);
    }
    if (first == 0 && job.square != nullptr) {
      scan_tile<T, C, kTileRows, true>(queries, rows + i, job.dim, n, dot + i, job.square + i);
    } else {
      scan_tile<T, C, kTileRows, false>(queries, rows + i, job.dim, n, dot + i, nullptr);
    }
  }
}

template <class T>
void scan(const ScanJob& job) {
  for (int32_t first = 0; first < job.query_count; first += kTileQueries) {
    const int32_t count = job.query_count - first;
    if constexpr (kTileQueries == 4) {
      if (count >= 4) {
        scan_block<T, 4>(job, first);
        continue;
      }
      if (count == 3) {
        scan_block<T, 3>(job, first);
        continue;
      }
    }
    if (count >= 2) {
      scan_block<T, 2>(job, first);
    } else {
      scan_block<T, 1>(job, first);
    }
  }
}

}  // namespace

template <>
const Scan Level<ELVA_LEVEL>::scans[4] = {scan<Bf16>, scan<Fp16>, scan<float>, scan<double>};

}  // namespace elva
