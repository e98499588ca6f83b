// The inner loops that are compiled once per CPU level, and the choice among the levels.
#ifndef ELVA_CPU_KERNELS_H_
#define ELVA_CPU_KERNELS_H_

#include <stdint.h>

#include "in_batch_kernels.h"
#include "levels.h"
#include "matrix_kernels.h"

namespace elva {

// Dot products of `count` dense rows with a dense query, and their squared norms. A row's two
// results depend on that row and the query alone, not on its neighbours or on alignment.
struct DotJob {
  const void* query;
  const void* const* rows;  // [count + kDotAhead]; the last ones, of memory that is read next, are
                            // asked for alone. [count] where count < 4
  int64_t count;
  int64_t dim;
  double* dot;     // [count]
  double* square;  // [count]
};

constexpr int64_t kDotAhead = 8;

// out_i = a_i * query + b_i * row_i, rounded once; query_sum += sum over i of a_i * row_i. What is
// null is not wanted: outs (then query and b are not read) or query_sum.
// a and b are float, or double for double elements, below 2^60 like the rows' and the query's
// entries.
struct GradientJob {
  const void* query;
  const void* const* rows;
  void* const* outs;
  const void* a;
  const void* b;
  int64_t count;
  int64_t dim;
  double* query_sum;         // [dim rounded up to kPadding]
  bool stream;               // write past the caches; wants rows of whole, aligned 64-byte lines
  const void* const* ahead;  // [count] rows that are read next, asked for meanwhile; or null
};

// out = query_sum + b * query.
struct QueryGradientJob {
  const void* query;
  const double* query_sum;
  double b;
  int64_t dim;
  void* out;
  bool stream;  // as above
};

// Sums over the pairs of a group's candidates; sigma_ij = sigmoid((s_j - s_i) / temperature).
struct PairJob {
  const void* scores;  // [count] float, or double; finite
  int64_t count;
  double temperature;
  const void* rank_slopes;  // [count], as scores; read by soft_slopes alone
  double* sums;             // [count]
};

constexpr int64_t kPadding = 32;

// Dot products of up to kScanQueries queries with `count` dense rows, and the rows' squared norms.
// As in DotJob a result depends on its row and its query alone.
struct ScanJob {
  const void* const* queries;  // each dense and followed by zeros up to a multiple of kPadding
  int32_t query_count;
  const void* const* rows;  // [count + kScanAhead]; the last ones are read in the next job
  int64_t count;            // a multiple of kScanRows
  int64_t dim;
  double* dot;     // [kScanQueries, count]
  double* square;  // [count]; null: known from an earlier job, which has also read the rows
  const void* const* next;  // [count]: rows of which bytes [next_begin, next_end) are asked for
  int64_t next_begin, next_end;
};

constexpr int64_t kScanQueries = 4;
constexpr int64_t kScanRows = 4;
constexpr int64_t kScanAhead = 8;

using Scan = void (*)(const ScanJob&);

// Products of up to kCodeQueries coded queries with `count` rows of codes, and the bounds that they
// give: gain[c] * dot * scale[r] + missed[c] * (1 + lost[r]) + lost[r].
struct CodeJob {
  const int8_t* const* queries;  // each followed by zeros up to a multiple of kCodePadding
  int32_t query_count;
  const int32_t* surplus;  // [query_count], of each query
  const float* gain;       // [query_count]
  const float* missed;     // [query_count], above 0
  const int8_t* rows;      // [count, dim]
  int64_t count;
  int64_t dim;
  int64_t ahead;       // rows behind each that are asked for meanwhile; 0: none is
  const float* scale;  // [count]
  const float* lost;   // [count]
  int32_t* dot;        // [query_count, count]
  float* bound;        // [query_count, count]
  float* largest;      // [query_count]: of each query's bounds
};

constexpr int64_t kCodeQueries = 4;
constexpr int64_t kCodePadding = 64;
constexpr float kFineSteps = 256;  // of a fine code in a code's step

struct CodeKernels {
  void (*scan)(const CodeJob&);
  // The product of one query, padded as above, and one row.
  int32_t (*dot)(const int8_t* query, int32_t surplus, const int8_t* row, int64_t dim);
  // What the level's products of a query are too large by.
  int32_t (*surplus)(const int8_t* query, int64_t dim);
  // Elements as floats, and the largest magnitude of them: infinite or NaN if any is. By ElvaDtype;
  // null for ELVA_FP64, whose range floats do not have.
  float (*widen[4])(const void* row, int64_t dim, float* out);
  // The sum of squares of numbers of at most 2.
  double (*square)(const float* row, int64_t dim);
  // A Hadamard matrix times `size` numbers, a power of two, over the square root of size.
  void (*mix)(float* row, int64_t size);
  // Numbers over a code's step, 1 / inverse, to whole ones and, unless `fine` is null, to 256ths of
  // a step; the length of what is left, in steps.
  double (*round)(const float* row, int64_t dim, float inverse, int8_t* code, int8_t* fine);
};

struct Kernels {
  void (*dots[4])(const DotJob&);  // by ElvaDtype
  void (*gradients[4])(const GradientJob&);
  void (*query_gradient[4])(const QueryGradientJob&);
  // ranks[i] = 1 + the number of keys above keys[i].
  void (*count_ranks)(const uint64_t* keys, int64_t count, int32_t* ranks);
  // By value, float and double. sums[i] = 1 + sum over j != i of sigma_ij.
  void (*soft_ranks[2])(const PairJob&);
  // sums[i] = sum over j of sigma_ij (1 - sigma_ij) (rank_slopes[j] - rank_slopes[i]).
  void (*soft_slopes[2])(const PairJob&);
  const Scan* scan;  // [4], by ElvaDtype; of the same level, as what follows
  const InBatchKernels* in_batch;
  const MatrixKernels* matrix;
  const CodeKernels* codes;
};

// What is compiled once per CPU level: each *_simd.cpp defines one of these.
template <int level>
struct Level {
  static const Kernels kernels;
  static const Scan scans[4];
  static const InBatchKernels in_batch;
  static const MatrixKernels matrix;
  static const CodeKernels codes;
};

#define ELVA_DECLARE_LEVEL(number, name)        \
  template <>                                   \
  const Kernels Level<number>::kernels;         \
  template <>                                   \
  const Scan Level<number>::scans[4];           \
  template <>                                   \
  const InBatchKernels Level<number>::in_batch; \
  template <>                                   \
  const MatrixKernels Level<number>::matrix;    \
  template <>                                   \
  const CodeKernels Level<number>::codes;
ELVA_EACH_LEVEL(ELVA_DECLARE_LEVEL)
#undef ELVA_DECLARE_LEVEL

// The best level, or the one that ELVA_KERNELS_CPU_LEVEL names; null where that is not possible
// (elva_cpu_level_error).
const Kernels* chosen_kernels();

}  // namespace elva
#endif  // ELVA_CPU_KERNELS_H_
