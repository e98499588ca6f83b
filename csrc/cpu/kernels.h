// The inner loops that are compiled once per CPU level, and the choice among the levels.
#ifndef ELVA_CPU_KERNELS_H_
#define ELVA_CPU_KERNELS_H_

#include <stdint.h>

#include "batch_kernels.h"

namespace elva {

// Dot products of `count` dense rows with a dense query, and their squared norms. A row's two
// results depend on that row and the query alone, not on its neighbours or on alignment.
struct DotJob {
  const void* query;
  const void* const* rows;
  int64_t count;
  int64_t dim;
  double* dot;     // [count]
  double* square;  // [count]
};

// out_i = a_i * query + b_i * row_i, rounded once; query_sum += sum over i of a_i * row_i.
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
  double* query_sum;  // [dim rounded up to kPadding]
  bool stream;        // write past the caches; wants rows of whole, aligned 64-byte lines
  const void*
      ahead;  // memory that the next group starts with, or null: asked for while this job computes
  int64_t ahead_lines;
};

// out = query_sum + b * query.
struct QueryGradientJob {
  const void* query;
  const double* query_sum;
  double b;
  int64_t dim;
  void* out;
};

constexpr int64_t kPadding = 32;

struct Kernels {
  const char* name;
  void (*dots[4])(const DotJob&);  // by ElvaDtype
  void (*gradients[4])(const GradientJob&);
  void (*query_gradient[4])(const QueryGradientJob&);
  // ranks[i] = 1 + the number of keys above keys[i].
  void (*count_ranks)(const uint64_t* keys, int64_t count, int32_t* ranks);
  const BatchKernels* batch;  // of the same level
};

extern const Kernels kPlainKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
#endif

// The best level, or the one that ELVA_KERNELS_CPU_LEVEL names; null where that is not possible
// (elva_cpu_level_error).
const Kernels* chosen_kernels();

}  // namespace elva
#endif  // ELVA_CPU_KERNELS_H_
