// The inner loops of matrix products and of the gradients through norms that are compiled once per
// CPU level.
#ifndef ELVA_CPU_MATRIX_KERNELS_H_
#define ELVA_CPU_MATRIX_KERNELS_H_

#include <stdint.h>

#include "numeric.h"

namespace elva {

// One tile of a product out of packed panels of words: c[i, j] = (add ? c[i, j] : 0) + the sum over
// p of a[p, i] b[p, j], summed from p = 0 on in an accumulator of its own. A word is an element, or
// a pair of bf16 neighbours in depth. An element's bits depend on its row of a and its column of b
// alone, not on its place in the tile.
template <class Word, class S>
struct MatrixTile {
  int64_t rows;
  int64_t columns;
  int64_t row_step;  // `rows`, or a part of it: multiply takes a multiple of it
  void (*multiply)(const Word* a, const Word* b, int64_t steps, S* c, int64_t c_stride, bool add,
                   int64_t rows);
  int64_t step_multiple;  // of `steps`: zeros lie behind the depth
  bool a_in_rows;         // a panel of a is [rows, steps], else [steps, rows], as one of b is
  // Around all of a thread's calls of `multiply`; or null.
  void (*begin)();
  void (*end)();
};

// Two neighbours in depth.
struct Bf16Pair {
  uint32_t bits;
};

constexpr int64_t kMostPanelRows = 32;
constexpr int64_t kMostRows = 192;  // of a block of a: it stays in the second-level cache

// `count` rows, kMostRows or fewer, of `depth` floats as pairs of bf16 halves, x scale = high + low
// + 2^-18 or less of it, in panels of `width` rows that are zero-padded.
struct HalvesJob {
  const float* rows;
  int64_t row_stride, stride;
  int64_t count, depth;
  int64_t width;
  int64_t steps;       // of a panel: (depth + 1) / 2 or more; zeros lie behind the depth
  bool in_rows;        // a panel is [width, steps], else [steps, width]
  const float* scale;  // [depth]
  const float* norm;   // [depth]
  float allowed;
  Bf16Pair* high;  // panels
  Bf16Pair* low;
  bool* matters;  // [panels]: whether some row's sum of (low norm)^2 exceeds `allowed`
};

// Through u = x inverse_norm: out = (grad - u (u . grad)) inverse_norm 2^-exponent.
struct Bf16GradientJob {
  const Bf16* x;
  const float* grad;
  int64_t dim;
  double inverse_norm;
  int exponent;
  bool rounded;  // once, to bf16; else float
  void* out;
};

constexpr int64_t kColumnsOfNorms = 64;

// sums[j] = the sum over rows of (x scale)^2, for kColumnsOfNorms columns or fewer.
struct ColumnSquaresJob {
  const Bf16* rows;
  int64_t count, stride;
  int64_t columns;
  const float* scale;  // [count]
  float* sums;
};

struct MatrixKernels {
  MatrixTile<float, float> f32;
  MatrixTile<double, double> f64;
  MatrixTile<Bf16Pair, float> bf16;  // no `multiply` where the level has none
  void (*halves)(const HalvesJob&);
  void (*bf16_gradient)(const Bf16GradientJob&);
  void (*column_squares)(const ColumnSquaresJob&);
  // As unit_rows.cpp's unit_row and gradient_row, for dense floats.
  void (*f32_unit)(const float* x, int64_t dim, float* unit, double* norm);
  void (*f32_gradient)(const float* unit, const float* grad, double inverse_norm, int64_t dim,
                       float* out);
  // out += factor x.
  void (*add_row)(const Bf16* x, float factor, int64_t dim, float* out);
};

}  // namespace elva
#endif  // ELVA_CPU_MATRIX_KERNELS_H_
