// The C API of the in-batch ops, in steps: unit rows, their products (scores), rows of scores,
// gradients. Rules, types and statuses: elva.h.
//
// Scores are rows of `width` values, the number of candidates rounded up to 16. "Value" is float,
// or double for ELVA_FP64. The definition: elva_kernels.reference.
#ifndef ELVA_IN_BATCH_H_
#define ELVA_IN_BATCH_H_

#include "elva.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  ElvaDtype dtype;
  ElvaDtype unit_dtype;  // the value's; or ELVA_BF16, of ELVA_BF16: the rows as they are, times
                         // 2^-e where their squares would leave the range of float
  int32_t threads;
  int64_t count;
  int64_t dim;
  ElvaInput rows;  // [count, dim]
  void* unit;      // [count, dim]; zeros for a row that is zero or not finite
  double* norm;    // [count, 2]: 1 / |x 2^-e| (0 for a zero row, NaN for one not finite), and e
  int64_t width;   // count or more
  float* scale;    // [width], what makes units of the rows, 0 for one not finite and behind them;
                   // null where they are units
} ElvaUnitRowsArgs;

// What score_rows adds to the scores of candidates.
typedef struct {
  ElvaDtype dtype;  // ELVA_FP32 or ELVA_FP64
  int64_t count;
  int64_t width;
  const double* norm;  // [count, 2]
  void* exclusion;     // value [width]: 0, or -inf for a row not finite and for padding
} ElvaExclusionArgs;

// Norms of queries become NaN where a pair of theirs is not finite.
typedef struct {
  int64_t rows;
  int64_t positives;
  int64_t candidates;
  const int64_t* target;         // [rows, positives]
  const double* candidate_norm;  // [candidates, 2]
  double* norm;                  // [rows, 2]
} ElvaSpoilArgs;

// Rows of slopes on all candidates, of slopes on some: added in order where one is named twice.
typedef struct {
  ElvaDtype dtype;  // ELVA_FP32 or ELVA_FP64
  int32_t threads;
  int64_t rows;
  int64_t columns;
  int64_t width;
  const int64_t* index;  // [rows, columns]; below 0: none
  const void* slopes;    // value [rows, columns]
  void* out;             // value [rows, width]
} ElvaSpreadRowsArgs;

typedef struct {
  ElvaDtype dtype;  // of grad_rows
  ElvaDtype unit_dtype;
  int32_t threads;
  int64_t count;
  int64_t dim;
  const void* unit;       // [count, dim]
  const void* grad_unit;  // value [count, dim]
  const double* norm;     // [count, 2]
  void* grad_rows;        // [count, dim]; with a unit of ELVA_BF16 that, or ELVA_FP32
} ElvaUnitGradientArgs;

// c [m, n] = a [m, k] b [k, n], or c += a b. Dense last dimension of c; k >= 1, m and n may be 0.
typedef struct {
  ElvaDtype a_dtype;  // as b's; ELVA_FP32 also beside ELVA_BF16
  ElvaDtype b_dtype;  // ELVA_FP32 or ELVA_FP64; ELVA_BF16 where elva_multiplies_bf16()
  int32_t threads;
  int64_t m, n, k;
  const void* a;
  int64_t a_row_stride, a_stride;
  const void* b;
  int64_t b_row_stride, b_stride;
  void* c;  // value of b
  int64_t c_row_stride;
  bool add;
  // Of ELVA_FP32 times ELVA_BF16 alone: a's columns are first multiplied by a_scale, then held to
  // 16 bits; or to 8 in rows where the errors over a_scale have a norm of `allowed` or less.
  const float* a_scale;  // [k]
  double allowed;
} ElvaMatrixArgs;

typedef struct {
  ElvaDtype dtype;  // ELVA_FP32 or ELVA_FP64, of the values
  int32_t threads;
  int64_t rows;
  int64_t candidates;
  int64_t width;
  void* scores;           // value [rows, width]; becomes the negatives' scores, -inf elsewhere
  const void* exclusion;  // value [width]: 0, or -inf for candidates not finite and for padding
  const void* scale;      // value [width], 1 / |candidate|; null: the scores are cosines already
  const double* norm;     // [rows, 2], of the queries
  const int64_t* target;  // [rows, positives]: a candidate; -1: none; -2: one that does not exist
  int64_t positives;
  const int64_t* skipped;        // candidates that are no negatives, beside the positives; or null
  const int64_t* skipped_first;  // [rows, segments]: a row skips skipped[first .. last) of each
  const int64_t* skipped_last;   // [rows, segments]
  int64_t segments;
  double max_score;            // inf: no limit
  double inverse_temperature;  // NaN: no sums
  int64_t k;
  int32_t* rank;           // [rows, positives]; 0 for none
  int32_t* n_greater;      // [rows, positives]
  int32_t* n_equal;        // [rows, positives]
  void* target_score;      // value [rows, positives]; -inf for none, NaN where it is not finite
  void* hardest_score;     // value [rows]
  int64_t* hardest_index;  // [rows]
  void* topk_scores;       // value [rows, k]
  int64_t* topk_index;     // [rows, k]
  double* sum;             // [rows]: over the negatives, exp((s - hardest) / T)
  double* moment;          // [rows]: and that times (s - hardest)
} ElvaScoreRowsArgs;

// One direction of InfoNCE from what score_rows or column_sums summed: log-sum-exp (11) and
// contrastive loss (13) of elva_kernels.reference and their derivatives. All NaN or 0 where
// the target's score is NaN, all 0 where it is -inf.
typedef struct {
  ElvaDtype dtype;
  int64_t count;
  const void* target_score;  // value [count]
  const int64_t* at;         // [count], where the sums of i are; null: i
  const void* peak;          // value, -inf where nothing was summed
  const double* sum;
  const double* moment;
  double temperature;
  double* loss;              // [count]
  double* share;             // [count], a negative's probability over exp((s - peak) / T)
  double* others;            // [count], the negatives' probability
  double* grad_temperature;  // [count], d loss / d T
} ElvaInfoNceTermsArgs;

// Masked scores become row_factor exp((s - row_peak) / T) + column_factor exp((s - column_peak) /
// T), and every target_slope is added at its target.
typedef struct {
  ElvaDtype dtype;
  int32_t threads;
  int64_t rows;
  int64_t width;
  void* scores;              // value [rows, width]
  const void* row_peak;      // value [rows], finite
  const void* row_factor;    // value [rows]
  const void* target_slope;  // value [rows, positives]; null: all 0
  const int64_t* target;     // [rows, positives]; below 0: none
  int64_t positives;
  const void* column_peak;    // value [width], finite; null: no second term
  const void* column_factor;  // value [width]
  double inverse_temperature;
} ElvaSlopeRowsArgs;

// Adds masked scores to sums over columns: exp((s - peak) / T), and that times (s - peak).
typedef struct {
  ElvaDtype dtype;
  int32_t threads;
  int64_t rows;
  int64_t width;
  const void* scores;  // value [rows, width]
  double inverse_temperature;
  void* peak;      // value [width], -inf at first
  double* sum;     // [width]
  double* moment;  // [width]
} ElvaColumnSumsArgs;

// The largest norm of a column of dense rows times their scales, at most 1 % above the truth.
typedef struct {
  int32_t threads;
  int64_t count;
  int64_t dim;
  const void* rows;    // ELVA_BF16 [count, dim]
  const float* scale;  // [count]
  double* norm;        // [1]
} ElvaColumnNormArgs;

// out[into] += slope[i] scale[from] rows[from] in the order of i, of pairs of a row and its targets:
// from targets into rows, or the other way round.
typedef struct {
  int32_t threads;
  int64_t count;  // of pairs
  int64_t dim;
  int64_t positives;
  const int64_t* target;  // [count], below 0: none; the row of pair i is i / positives
  bool into_targets;
  const float* slope;  // [count]
  const float* scale;  // [.]
  const void* rows;    // ELVA_BF16 [., dim]
  float* out;          // [out_count, dim]
  int64_t out_count;
} ElvaAddRowsArgs;

// The rewards of queries, or the slopes on their scores: rank reward of a head (12).
typedef struct {
  ElvaDtype dtype;  // ELVA_FP32 or ELVA_FP64
  int32_t threads;
  int64_t rows;
  int64_t positives;  // 1 or more
  int64_t negatives;
  int64_t head;
  ElvaRewardWeights weights;
  const void* scores;   // value [rows, positives + negatives]; negatives descending, then -inf
  const int32_t* rank;  // [rows, positives], 0 for none
  void* reward;         // value [rows], as the next two; not written where slopes are
  void* margin_reward;
  void* rank_reward;
  const void* grad_reward;  // value [rows]
  void* slopes;             // value [rows, positives + negatives]; null: rewards are wanted
} ElvaHeadRewardArgs;

// The log-sum-exp (11) of queries' positives and negatives.
typedef struct {
  ElvaDtype dtype;
  int64_t rows;
  int64_t positives;
  const void* target_score;  // value [rows, positives]
  const void* peak;          // value [rows], as in ElvaInfoNceTermsArgs
  const double* sum;         // [rows]
  double temperature;
  void* logsumexp;  // value [rows]
} ElvaLogSumExpArgs;

// What makes slopes of the scores of one direction of InfoNCE: d sum(weight * loss) / d score.
typedef struct {
  ElvaDtype dtype;
  int64_t rows;
  int64_t positives;
  const int64_t* target;      // [rows, positives]
  const void* target_score;   // value [rows, positives]
  const double* weight;       // [rows]
  double weight_factor;       // of all of them
  const double* share;        // [rows, positives], as in ElvaInfoNceTermsArgs
  const double* others;       // [rows, positives]
  const double* more_others;  // [rows, positives], of the other direction; null: 0
  const void* peak;           // value [rows]
  double temperature;
  double* upstream;    // [rows, positives], of each pair's loss; 0 for one that is not finite
  void* target_slope;  // value [rows, positives]
  void* row_factor;    // value [rows]
  void* row_peak;      // value [rows], 0 where it is not finite
} ElvaInfoNceFactorsArgs;

ElvaStatus elva_unit_rows_cpu(const ElvaUnitRowsArgs* args);
ElvaStatus elva_unit_gradient_cpu(const ElvaUnitGradientArgs* args);
ElvaStatus elva_matrix_product_cpu(const ElvaMatrixArgs* args);
// Whether the CPU level in use multiplies pairs of bf16.
bool elva_multiplies_bf16(void);
ElvaStatus elva_column_norm_cpu(const ElvaColumnNormArgs* args);
ElvaStatus elva_add_rows_cpu(const ElvaAddRowsArgs* args);
ElvaStatus elva_exclusion_cpu(const ElvaExclusionArgs* args);
ElvaStatus elva_spoil_cpu(const ElvaSpoilArgs* args);
ElvaStatus elva_spread_rows_cpu(const ElvaSpreadRowsArgs* args);
ElvaStatus elva_score_rows_cpu(const ElvaScoreRowsArgs* args);
ElvaStatus elva_info_nce_terms_cpu(const ElvaInfoNceTermsArgs* args);
ElvaStatus elva_slope_rows_cpu(const ElvaSlopeRowsArgs* args);
ElvaStatus elva_column_sums_cpu(const ElvaColumnSumsArgs* args);
ElvaStatus elva_head_reward_cpu(const ElvaHeadRewardArgs* args);
ElvaStatus elva_logsumexp_cpu(const ElvaLogSumExpArgs* args);
ElvaStatus elva_info_nce_factors_cpu(const ElvaInfoNceFactorsArgs* args);

#ifdef __cplusplus
}
#endif
#endif  // ELVA_IN_BATCH_H_
