// The C API of elva_kernels: one plain args struct per op, one function per op and device.
//
// The steps of the in-batch ops: elva_in_batch.h.
//
// Rules: no torch and no Python here; the caller checks shapes, allocates outputs and keeps
// pointers alive. Inputs may have any strides (counted in elements; 0 where broadcast) and any
// alignment their dtype allows; outputs are dense, in the order of the shape. All offsets are
// 64-bit. Functions are thread-safe and return a status.
#ifndef ELVA_H_
#define ELVA_H_

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { ELVA_MAX_DIMS = 8 };

typedef enum { ELVA_BF16 = 0, ELVA_FP16 = 1, ELVA_FP32 = 2, ELVA_FP64 = 3 } ElvaDtype;

typedef enum {
  ELVA_OK = 0,
  ELVA_OUT_OF_MEMORY = 1,
  ELVA_BAD_LEVEL = 2,     // ELVA_KERNELS_CPU_LEVEL names no level, or one that this CPU lacks
  ELVA_DEVICE_ERROR = 3,  // a CUDA launch failed
  ELVA_UNSUPPORTED = 4    // this function does not compute what is asked
} ElvaStatus;

// Leading dimensions "*" of every operand of a call, already coalesced; groups = product of sizes.
typedef struct {
  int64_t groups;
  int32_t ndim;
  int64_t sizes[ELVA_MAX_DIMS];
} ElvaBatch;

// One operand [*, rows, dim] or [*, rows] or [*]; data may be null where the op says that it is
// optional.
typedef struct {
  const void* data;
  int64_t batch_strides[ELVA_MAX_DIMS];
  int64_t row_stride;
  int64_t stride;  // of the last dimension
} ElvaInput;

// R_total = w_margin * R_margin + w_rank * R_rank (Liu et al., ELVA, arXiv:2606.20280, sec. 3.4).
typedef struct {
  double margin;
  double rank_penalty;
  double w_margin;
  double w_rank;
  double rank_temperature;  // 0: the integer ranks; else soft ones, at least 1e-6
} ElvaRewardWeights;

// Below, "value" is float, or double for ELVA_FP64.
typedef struct {
  ElvaDtype dtype;
  int32_t threads;  // at most this many, the caller included
  ElvaBatch batch;
  int64_t negatives;
  int64_t dim;
  ElvaRewardWeights weights;
  ElvaInput query;        // [*, dim]
  ElvaInput positive;     // [*, dim]
  ElvaInput negative;     // [*, negatives, dim]; with an index a bank [bank_rows, dim]
  ElvaInput mask;         // bool [*, negatives], true = live; null: all live
  const void* relevance;  // value [*, negatives], dense; null: all 0. A live one outside [0, 1]
                          // makes its group's rewards and gradients NaN
  ElvaInput index;      // int64 [*, negatives], rows of the bank; -1: none; others are never read,
                        // and count as rows that are not finite. null: negatives in their place
  int64_t bank_rows;    // read where there is an index
  ElvaInput upstream;   // value [*]; null: 1
  void* reward;         // value [*]
  void* margin_reward;  // value [*]
  void* rank_reward;    // value [*]
  int32_t* rank;        // [*]
  void* scores;         // value [*, negatives + 1]
  double*
      coefficients;  // [*, 2 * negatives + 3]; null in forward: not wanted. See cpu/coefficients.h
  // Gradients in the inputs' dtype; null: not wanted.
  void* grad_query;     // [*, dim]
  void* grad_positive;  // [*, dim]
  void* grad_negative;  // [*, negatives, dim]; with an index null: see ElvaBankGradientArgs
  void* scratch;  // CUDA only, as all that follows: elva_reward_scratch_bytes_cuda, on 16 bytes
  int32_t device;
  void* stream;
} ElvaRewardArgs;

// Values; with grad_* also the gradients (value and grad in one pass over memory); with
// coefficients what the backward needs.
ElvaStatus elva_reward_forward_cpu(const ElvaRewardArgs* args);
// Gradients from coefficients (read), the inputs (read again) and upstream.
ElvaStatus elva_reward_backward_cpu(const ElvaRewardArgs* args);

// The same on a GPU: pointers of `device`, launched on `stream`; not for ELVA_FP64. Where grad_* is
// wanted so are coefficients: groups that do not fit the shared memory of a cluster take two
// passes.
ElvaStatus elva_reward_forward_cuda(const ElvaRewardArgs* args);
ElvaStatus elva_reward_backward_cuda(const ElvaRewardArgs* args);

// The gradient of a bank: for each of its rows the sum over the row's places in the index.
typedef struct {
  ElvaDtype dtype;
  int32_t threads;
  ElvaBatch batch;
  int64_t negatives;
  int64_t dim;
  int64_t bank_rows;
  ElvaInput query;             // [*, dim]
  ElvaInput negative;          // [bank_rows, dim]
  ElvaInput upstream;          // value [*]; null: 1
  const double* coefficients;  // [*, 2 * negatives + 3], of the forward
  const int64_t* order;        // places in the index, group * negatives + negative, by row
  const int64_t* first;        // [bank_rows + 1]; row r's are order[first[r]..first[r + 1])
  void* grad_negative;         // [bank_rows, dim], the inputs' dtype; 0 for a row without a place
  int32_t device;              // CUDA only, as what follows
  void* stream;
} ElvaBankGradientArgs;

ElvaStatus elva_bank_gradient_cpu(const ElvaBankGradientArgs* args);
ElvaStatus elva_bank_gradient_cuda(const ElvaBankGradientArgs* args);
// 0 unless groups are too large for a block's shared memory.
int64_t elva_reward_scratch_bytes_cuda(int64_t groups, int64_t negatives);
// What ELVA_DEVICE_ERROR last meant on this thread.
const char* elva_device_error(void);

typedef struct {
  ElvaDtype dtype;
  int32_t threads;
  ElvaBatch batch;
  int64_t candidates;
  ElvaRewardWeights weights;
  ElvaInput scores;       // [*, candidates]
  ElvaInput mask;         // bool [*, candidates - 1]; null: all live
  const void* relevance;  // value [*, candidates - 1], as above
  ElvaInput upstream;     // value [*]; null: 1
  void* reward;           // value [*]; all four null where only the gradient is wanted
  void* margin_reward;
  void* rank_reward;
  int32_t* rank;
  void* grad_scores;  // [*, candidates], the scores' dtype; null: not wanted
} ElvaScoresArgs;

ElvaStatus elva_reward_from_scores_cpu(const ElvaScoresArgs* args);

typedef enum { ELVA_SCALE_STD = 0, ELVA_SCALE_BATCH = 1, ELVA_SCALE_NONE = 2 } ElvaScale;

// Each reward less its group's mean, over a deviation.
typedef struct {
  ElvaDtype dtype;
  int32_t threads;
  ElvaBatch batch;
  int64_t size;        // rewards in a group, at least 1
  ElvaScale scale;     // the deviation: the group's own, that of all groups, or 1
  double std_eps;      // added to a deviation
  double same_reward;  // a group whose rewards are all closer than this gets 0
  ElvaInput reward;    // [*, size]
  void* advantages;    // value [*, size]
} ElvaAdvantagesArgs;

ElvaStatus elva_group_advantages_cpu(const ElvaAdvantagesArgs* args);

typedef enum { ELVA_DOT = 0, ELVA_COSINE = 1 } ElvaMetric;

// The k best corpus rows of each query: score descending, then index ascending.
typedef struct {
  ElvaDtype dtype;
  int32_t threads;
  ElvaMetric metric;
  int64_t queries;
  int64_t rows;
  int64_t dim;
  int64_t k;         // at most rows
  ElvaInput query;   // [queries, dim]
  ElvaInput corpus;  // [rows, dim]; read block by block
  void* scores;      // value [queries, k]; -inf where the row or the query is not finite
  int64_t* index;    // [queries, k]
} ElvaTopkArgs;

ElvaStatus elva_topk_cpu(const ElvaTopkArgs* args);

// Rows as 8-bit codes: (16) of elva_kernels.reference.
typedef struct {
  ElvaDtype dtype;
  int32_t threads;
  int64_t count;
  int64_t dim;     // at most 65,536
  ElvaInput rows;  // [count, dim]
  int8_t* code;    // [count, dim]
  int8_t* fine;    // [count, dim], in 256ths of a code's step; null: not wanted
  float* scale;    // [count]
  float* lost;     // [count]; infinite for a row that is not finite
} ElvaRowCodesArgs;

ElvaStatus elva_row_codes_cpu(const ElvaRowCodesArgs* args);

// The rows with the largest bounds of each query, (17) of elva_kernels.reference: bound descending,
// then index ascending; then -inf and -1.
typedef struct {
  int32_t threads;
  int64_t queries;
  int64_t rows;
  int64_t dim;               // at most 65,536
  int64_t depth;             // at most rows
  const int8_t* query_code;  // [queries, dim]
  const int8_t* query_fine;  // [queries, dim]
  const float* query_scale;  // [queries]
  const float* query_lost;   // [queries]
  const int8_t* code;        // [rows, dim]
  const float* scale;        // [rows]
  const float* lost;         // [rows]
  const uint8_t* mask;       // [rows]: 0 for a row that may not be found; null: all may
  const float* floor;        // [queries]: lower bounds need not be found; null: all are
  float* bounds;             // [queries, depth]
  int64_t* index;            // [queries, depth]
} ElvaNearestCodesArgs;

ElvaStatus elva_nearest_codes_cpu(const ElvaNearestCodesArgs* args);

// Bounds (17) of all rows for each query, of which elva_select_cuda takes the best; on a GPU
// alone.
typedef struct {
  int32_t device;
  void* stream;
  int64_t queries;
  int64_t rows;
  int64_t dim;               // at most 65,536
  int64_t padded_dim;        // of a query: dim or more, a multiple of ELVA_CODE_PIECE
  const int8_t* query;       // [queries, 2, padded_dim] on 16 bytes: codes and fine codes
  const float* query_scale;  // [queries]
  const float* query_lost;   // [queries]
  const int8_t* code;        // [rows, dim]
  const float* scale;        // [rows]
  const float* lost;         // [rows]
  const uint8_t* mask;       // [rows]: 0 for a row that may not be found; null: all may
  float* bounds;             // [queries, rows]; -inf where the mask is 0
} ElvaCodeBoundsArgs;

enum { ELVA_CODE_PIECE = 512 };
ElvaStatus elva_code_bounds_cuda(const ElvaCodeBoundsArgs* args);

// Scores of all corpus rows for each query, of which elva_select_cuda takes the best; on a GPU
// alone, and not for ELVA_FP64.
typedef struct {
  ElvaDtype dtype;
  int32_t device;
  void* stream;
  ElvaMetric metric;
  int64_t queries;
  int64_t rows;
  int64_t dim;
  ElvaInput query;   // [queries, dim]
  ElvaInput corpus;  // [rows, dim]
  void* scratch;     // elva_topk_scratch_bytes_cuda, on 16 bytes
  float* scores;     // [queries, rows]; -inf where the row or the query is not finite
  // Where the caller multiplies; see elva_topk_factors_cuda.
  float* row_factor;     // [queries]
  float* column_factor;  // [rows]
} ElvaTopkScoresArgs;

// The scratch begins with the queries as they are multiplied, [queries, padded_dim] in dtype, zeros
// where one is not finite.
int64_t elva_topk_scratch_bytes_cuda(const ElvaTopkScoresArgs* args, int64_t* padded_dim);
ElvaStatus elva_topk_scores_cuda(const ElvaTopkScoresArgs* args);

// In half precision, where the caller multiplies: what makes scores of its products of the scratch's
// queries and the corpus, by elva_select_cuda; `scores` is not looked at. Rows that are not finite,
// or out of the range of such products, have a column_factor of -1; their scores
// elva_topk_far_cuda writes after the product, of the same scratch and the same rows or some of
// them. All other column factors of ELVA_DOT are 1.
ElvaStatus elva_topk_factors_cuda(const ElvaTopkScoresArgs* args);
ElvaStatus elva_topk_far_cuda(const ElvaTopkScoresArgs* args);

enum { ELVA_SELECT_MOST = 256 };

// The k first of each row of scores: score descending, then index ascending; on a GPU alone.
typedef struct {
  int32_t device;
  void* stream;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t k;            // 1 to ELVA_SELECT_MOST
  const float* scores;  // [rows, columns]; NaN is passed over
  // null: scores as they are. Else -inf in a row whose factor is NaN, the score itself where
  // column_factor is negative, and elsewhere score * column_factor * row_factor, held within -limit
  // and limit.
  const float* row_factor;     // [rows]
  const float* column_factor;  // [columns]
  float limit;
  bool unit_columns;    // column factors are 1 or negative, and there is no limit
  int64_t first_index;  // of column 0
  int64_t kept;         // 0 to k: as many of earlier columns are in best and index, to choose among
  bool finite;          // index is -1 where the score is -inf
  void* scratch;        // elva_select_scratch_bytes_cuda
  float* best;          // [rows, k]; -inf behind the last column
  int64_t* index;       // [rows, k]; -1 behind the last column
} ElvaSelectArgs;

int64_t elva_select_scratch_bytes_cuda(int64_t rows, int64_t columns, int64_t k);
ElvaStatus elva_select_cuda(const ElvaSelectArgs* args);

// Memory of a large result. A released block is kept for the next result of about its size.
typedef struct {
  void* data;     // on a page of 2 MB, its contents undefined
  int64_t bytes;  // at least as many as were asked for
} ElvaBlock;

ElvaStatus elva_acquire_block(int64_t bytes, ElvaBlock* block);
void elva_release_block(const ElvaBlock* block);

// The CPU level in use ("amx", "avx512bf16", "avx512", "avx2", "plain"; "neondot", "neon", "plain"),
// or null with ELVA_BAD_LEVEL's reason below.
const char* elva_cpu_level(void);
const char* elva_cpu_level_error(void);
// Levels this CPU and its operating system support, best first, separated by spaces.
const char* elva_cpu_levels(void);
// Forgets the choice, so that the next call reads ELVA_KERNELS_CPU_LEVEL again (tests; not while
// calls run).
void elva_cpu_level_reset(void);

#ifdef __cplusplus
}
#endif
#endif  // ELVA_H_
