// The C API of the in-batch ops' steps on a GPU, where torch multiplies rows in half precision; not
// for ELVA_FP64. Pointers are the device's. Rules, types and statuses: elva.h.
//
// Rows of embeddings are kept times the power of two that brings their norm into [2^14, 2^15), in
// ELVA_FP16 those of ELVA_BF16 and ELVA_FP16, in ELVA_FP32 those of ELVA_FP32: no score depends on
// that, and slopes between them fit 16 bits. "Inverse" is the inverse of such a norm, 0 for a zero
// row, NaN for one that is not finite. Rows of scores have `width` elements, a multiple of 16. A
// temperature that is not above 0 makes NaN.
#ifndef ELVA_IN_BATCH_CUDA_H_
#define ELVA_IN_BATCH_CUDA_H_

#include "elva.h"

#ifdef __cplusplus
extern "C" {
#endif

// Rows of both sides; zeros for one that is zero or not finite.
typedef struct {
  ElvaDtype dtype;
  int32_t device;
  void* stream;
  int64_t dim;
  int64_t queries;
  ElvaInput query;          // [queries, dim]
  void* query_unit;         // [queries, dim], the rows times 2^-e
  float* query_inverse;     // [queries], and zeros up to a multiple of 16, as the candidates'
  int32_t* query_exponent;  // [queries]: e
  int64_t candidates;
  ElvaInput candidate;
  void* candidate_unit;
  float* candidate_inverse;
  int32_t* candidate_exponent;
} ElvaCudaUnitArgs;

// Masked products, rows of which score_rows has seen, are negatives' alone; NaN elsewhere. Times
// both inverses they are scores, which are not kept.
typedef struct {
  int32_t device;
  void* stream;
  int64_t rows;
  int64_t candidates;
  int64_t width;
  float* products;                 // [rows, width] of `unit` rows; becomes masked products
  bool keeps_scores;               // masked scores instead, -inf elsewhere
  const float* query_inverse;      // [rows]
  const float* candidate_inverse;  // [width], 0 behind the candidates
  const int64_t* target;  // [rows, positives]: a candidate; -1: none; -2: one that does not exist
  int64_t positives;
  const int64_t* skipped;  // candidates that are no negatives, beside the positives; null: none
  const int64_t* skipped_first;  // [rows, segments]
  const int64_t* skipped_last;   // [rows, segments]
  int64_t segments;
  double max_score;
  const double* temperature;  // [1]; null: no sums
  int32_t* rank;              // [rows, positives]; 0 for none
  int32_t* n_greater;         // [rows, positives]
  int32_t* n_equal;           // [rows, positives]
  float* target_score;        // [rows, positives]: -inf for none, NaN for a pair not finite
  float* hardest_score;
  int64_t* hardest_index;
  double* sum;  // as in ElvaScoreRowsArgs
  double* moment;
} ElvaCudaScoreArgs;

typedef struct {
  int32_t device;
  void* stream;
  int64_t rows;
  int64_t width;
  const float* products;  // masked
  const float* query_inverse;
  const float* candidate_inverse;
  double max_score;
  const double* temperature;
  bool is_first;  // chunk of rows: nothing has been summed
  float* peak;    // [width]
  double* sum;
  double* moment;
  void* scratch;  // elva_column_scratch_bytes_cuda, on 16 bytes
} ElvaCudaColumnArgs;

// InfoNCE of queries out of sums over their negatives, and with a weight what makes slopes: as
// ElvaInfoNceTermsArgs of one direction or both, ElvaLogSumExpArgs and ElvaInfoNceFactorsArgs.
typedef struct {
  int32_t device;
  void* stream;
  int64_t rows;
  int64_t positives;
  const int64_t* target;      // [rows, positives]
  const float* target_score;  // [rows, positives]
  const float* peak;          // [rows], of rows of scores, as the next two
  const double* sum;
  const double* moment;
  const float* column_peak;  // of columns, as the next two; null: of one direction
  const double* column_sum;
  const double* column_moment;
  const double* temperature;
  float* logsumexp;      // [rows]
  float* loss;           // [rows]; null: not wanted
  const double* weight;  // [rows]; null: none of the following
  float* target_slope;   // [rows, positives]
  float* row_factor;     // [rows]
  double* column_share;  // [rows, positives]: what a pair adds to its column's factor; null: no
  double* temperature_slope;  // [rows, positives]: and to the temperature's gradient
} ElvaCudaPairsArgs;

// The pairs of a candidate: order[first[j] .. first[j + 1]); with null for both: pair j of as many
// as there are.
typedef struct {
  int32_t device;
  void* stream;
  int64_t width;
  int64_t candidates;
  int64_t count;         // of pairs
  const int64_t* order;  // [count]
  const int64_t* first;  // [candidates + 1]
  const double* share;   // [count]
  float* factor;         // [width]: the sum over a candidate's pairs; 0 for padding
} ElvaCudaColumnFactorArgs;

// What comes of all: the exponent by which slopes are kept, the largest one's being 14 then, and
// the gradient on the temperature.
typedef struct {
  int32_t device;
  void* stream;
  int64_t rows;
  const double* weight;       // [rows], times 1 / T no less than a slope of the row
  const double* temperature;  // null: 1
  int64_t columns;
  const float* column_factor;  // [columns]; null: none
  int32_t* power;              // [1]; null: not wanted
  int64_t pairs;
  const double* temperature_slope;  // [pairs]
  double* grad_temperature;         // [1]; null: not wanted
} ElvaCudaTotalArgs;

// Masked products become row_factor exp((s - row_peak) / T) + column_factor exp((s - column_peak) /
// T), times both inverses and 2^power: 0 where a candidate is no negative.
typedef struct {
  int32_t device;
  void* stream;
  int64_t rows;
  int64_t width;
  const float* products;  // masked
  const float* query_inverse;
  const float* candidate_inverse;
  double max_score;
  const double* temperature;
  const float* row_peak;
  const float* row_factor;
  const float* column_peak;  // null: no second term
  const float* column_factor;
  const int32_t* power;
  int32_t halves;      // 0: float; 1: fp16; 2: fp16, and what that lost, behind all rows
  void* out;           // [rows, width]; with fewer than 2 halves it may be `products`
  int64_t row_stride;  // of out, in elements; a multiple of 8
} ElvaCudaSlopeArgs;

// The same of slopes on some candidates, none twice in a row.
typedef struct {
  int32_t device;
  void* stream;
  int64_t rows;
  int64_t candidates;
  int64_t width;
  int64_t columns;       // of index and slopes
  int64_t first_column;  // those before it are left out
  const int64_t* index;  // [rows, columns]; below 0: none
  const float* slopes;   // [rows, columns]
  const float* query_inverse;
  const float* candidate_inverse;
  const int32_t* power;
  int32_t halves;
  void* out;
  int64_t row_stride;
} ElvaCudaSpreadArgs;

// The gradients on rows of both sides, of sums over the rows of the other side times the slopes
// above, to which those of pairs are added first. NaN for a row that is not finite, and for a query
// with such a positive.
typedef struct {
  ElvaDtype dtype;  // of the gradients
  int32_t device;
  void* stream;
  bool is_half;  // rows are ELVA_FP16, else ELVA_FP32
  int64_t dim;
  const int32_t* power;
  int64_t positives;          // of a query
  const float* target_slope;  // [queries, positives]
  const int64_t* target;      // [queries, positives]
  const int64_t* order;       // as in ElvaCudaColumnFactorArgs
  const int64_t* first;
  int64_t queries;
  const void* query_unit;
  const float* query_inverse;
  const int32_t* query_exponent;
  const float* grad_unit_query;  // [queries, dim]
  void* grad_query;              // [queries, dim]; null: not wanted
  int64_t candidates;
  const void* candidate_unit;
  const float* candidate_inverse;
  const int32_t* candidate_exponent;
  const float* grad_unit_candidate;
  void* grad_candidate;
} ElvaCudaGradientArgs;

// As ElvaHeadRewardArgs.
typedef struct {
  int32_t device;
  void* stream;
  int64_t rows;
  int64_t positives;
  int64_t negatives;
  int64_t head;
  ElvaRewardWeights weights;
  const float* scores;
  const int32_t* rank;
  float* reward;
  float* margin_reward;
  float* rank_reward;
  const float* grad_reward;
  float* slopes;
} ElvaCudaHeadRewardArgs;

// c [m, n] = a [m, k] b [k, n], or c += a b, of floats whatever a switch of precision says.
typedef struct {
  int32_t device;
  void* stream;
  int64_t m, n, k;
  ElvaInput a;  // [m, k]
  ElvaInput b;  // [k, n]
  float* c;     // [m, n], dense rows
  int64_t c_row_stride;
  bool add;
} ElvaCudaMatrixArgs;

ElvaStatus elva_unit_rows_cuda(const ElvaCudaUnitArgs* args);
ElvaStatus elva_matrix_product_cuda(const ElvaCudaMatrixArgs* args);
ElvaStatus elva_score_rows_cuda(const ElvaCudaScoreArgs* args);
int64_t elva_column_scratch_bytes_cuda(int64_t rows, int64_t width);
ElvaStatus elva_column_sums_cuda(const ElvaCudaColumnArgs* args);
ElvaStatus elva_info_nce_pairs_cuda(const ElvaCudaPairsArgs* args);
ElvaStatus elva_column_factor_cuda(const ElvaCudaColumnFactorArgs* args);
ElvaStatus elva_info_nce_total_cuda(const ElvaCudaTotalArgs* args);
ElvaStatus elva_slope_rows_cuda(const ElvaCudaSlopeArgs* args);
ElvaStatus elva_spread_rows_cuda(const ElvaCudaSpreadArgs* args);
ElvaStatus elva_unit_gradient_cuda(const ElvaCudaGradientArgs* args);
ElvaStatus elva_head_reward_cuda(const ElvaCudaHeadRewardArgs* args);

#ifdef __cplusplus
}
#endif
#endif  // ELVA_IN_BATCH_CUDA_H_
