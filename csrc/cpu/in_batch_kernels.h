// The inner loops of the in-batch ops that are compiled once per CPU level: rows and
// columns of scores.
#ifndef ELVA_CPU_IN_BATCH_KERNELS_H_
#define ELVA_CPU_IN_BATCH_KERNELS_H_

#include <stdint.h>

namespace elva {

// Elements that a row of scores is padded to.
constexpr int64_t kRowPadding = 16;

// Residues modulo this are told apart in a row, so that k of their largest bound the k largest.
constexpr int64_t kBests = 64;

// Positives that are counted against in one pass over a row.
constexpr int64_t kThresholds = 4;

// One query's dot products, in place: made cosines, clamped to [-1, 1], with -inf for who is no
// negative (negatives (9) of elva_kernels.reference), and what rank (10) and log-sum-exp (11)
// need of them.
template <class S>
struct ScoreRowJob {
  S* row;              // [width]
  int64_t width;       // padded
  const S* exclusion;  // [width], 0 or -inf
  const S* scale;      // [width], what a dot product is multiplied with; null: they are cosines
  S row_scale;         // and with this
  S smallest;          // below it a product of these is 0
  S max_score;
  int64_t candidates;
  const int64_t* target;  // [positives], below 0: none
  int64_t positives;
  const int64_t* skipped;        // who is no negative beside these, in segments; or null
  const int64_t* skipped_first;  // [segments]
  const int64_t* skipped_last;   // [segments]
  int64_t segments;
  S target_score;         // the first positive's; NaN for none
  S inverse_temperature;  // NaN: no sums
  int64_t n_greater, n_equal;
  S hardest;
  S best[kBests];  // the largest of each residue of j; the largest of these is the hardest
  double sum;      // over the negatives, exp((s - hardest) / T)
  double moment;   // and that times (s - hardest)
};

// A row of masked scores becomes row_factor exp((s - row_peak) / T) + column_factor exp((s -
// column_peak) / T). Peaks are finite and not below the scores.
template <class S>
struct SlopeRowJob {
  S* row;
  int64_t width;
  S row_peak;
  S row_factor;
  const S* column_peak;    // [width]; null: no second term
  const S* column_factor;  // [width]
  S inverse_temperature;
};

// What ScoreRowJob sums over a row, over columns of masked scores, added to what is there.
template <class S>
struct ColumnJob {
  const S* scores;  // [rows, stride]
  int64_t rows;
  int64_t stride;
  int64_t columns;  // a multiple of the vector's lanes
  S inverse_temperature;
  S* peak;         // [columns], -inf at first
  double* sum;     // [columns]
  double* moment;  // [columns]
};

template <class S>
struct RowKernels {
  void (*score_row)(ScoreRowJob<S>*);
  // Of a masked row, for each of kThresholds: how many scores are above it, how many equal it.
  void (*count_row)(const S* row, int64_t width, const S* thresholds, int64_t* greater,
                    int64_t* equal);
  // The indices, ascending, of what is at least `least` in a row; their number.
  int64_t (*at_least)(const S* row, int64_t width, S least, int64_t* index);
  void (*slope_row)(const SlopeRowJob<S>&);
  void (*columns)(const ColumnJob<S>&);
};

struct InBatchKernels {
  RowKernels<float> f32;
  RowKernels<double> f64;
};

template <class S>
const RowKernels<S>& row_kernels(const InBatchKernels& kernels);
template <>
inline const RowKernels<float>& row_kernels<float>(const InBatchKernels& kernels) {
  return kernels.f32;
}
template <>
inline const RowKernels<double>& row_kernels<double>(const InBatchKernels& kernels) {
  return kernels.f64;
}

}  // namespace elva
#endif  // ELVA_CPU_IN_BATCH_KERNELS_H_
