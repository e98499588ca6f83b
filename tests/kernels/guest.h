// What the two halves of test_neon.py share: a process here whose csrc/cpu runs in another one, of
// another processor, under an emulator. All memory of this one lies in an arena that both map at
// the same address, so that addresses cross as they are, and args structs have one layout on both.
#ifndef ELVA_TESTS_GUEST_H_
#define ELVA_TESTS_GUEST_H_

#include <cstdint>

#include "elva.h"
#include "elva_in_batch.h"

constexpr uint64_t kArena = 0x200000000000;  // an address that no loader takes
constexpr uint64_t kArenaBytes = uint64_t{16} << 30;

#define ELVA_GUEST_OPS(X)                 \
  X(reward_forward, ElvaRewardArgs)       \
  X(reward_backward, ElvaRewardArgs)      \
  X(bank_gradient, ElvaBankGradientArgs)  \
  X(reward_from_scores, ElvaScoresArgs)   \
  X(group_advantages, ElvaAdvantagesArgs) \
  X(topk, ElvaTopkArgs)                   \
  X(row_codes, ElvaRowCodesArgs)          \
  X(nearest_codes, ElvaNearestCodesArgs)  \
  X(unit_rows, ElvaUnitRowsArgs)          \
  X(unit_gradient, ElvaUnitGradientArgs)  \
  X(matrix_product, ElvaMatrixArgs)       \
  X(column_norm, ElvaColumnNormArgs)      \
  X(add_rows, ElvaAddRowsArgs)            \
  X(exclusion, ElvaExclusionArgs)         \
  X(spoil, ElvaSpoilArgs)                 \
  X(spread_rows, ElvaSpreadRowsArgs)      \
  X(score_rows, ElvaScoreRowsArgs)        \
  X(info_nce_terms, ElvaInfoNceTermsArgs) \
  X(slope_rows, ElvaSlopeRowsArgs)        \
  X(column_sums, ElvaColumnSumsArgs)      \
  X(head_reward, ElvaHeadRewardArgs)      \
  X(logsumexp, ElvaLogSumExpArgs)         \
  X(info_nce_factors, ElvaInfoNceFactorsArgs)

enum Op : int32_t {
#define ELVA_GUEST_NUMBER(op, Args) kOp_##op,
  ELVA_GUEST_OPS(ELVA_GUEST_NUMBER)
#undef ELVA_GUEST_NUMBER
      kOp_level
};

// Answered by an ElvaStatus.
struct Call {
  int32_t op;
  int32_t bytes;  // of the args struct
  uint64_t args;  // its address
};

// The args of kOp_level: the level that is asked for, or "", and what came of it.
struct Levels {
  char forced[64];
  char level[64];  // "": none
  char levels[128];
  char error[512];
  bool multiplies_bf16;
};

#endif  // ELVA_TESTS_GUEST_H_
