// What: the inner loops of matrix products: tiles out of packed panels, floats split into two bf16
//   halves, and the gradient through a bf16 row's norm.
// Source: the dots of cosine (8) of elva_kernels.reference, and their gradients.
// In: packed panels of words, rows of float or bf16: see matrix_kernels.h.
// Out: tiles of c, panels of halves, gradient rows: see matrix_kernels.h.
// Work split: the caller's thread, one job.
// Bytes: a panel of b from the first-level cache, one of a from the second-level one; a tile of c
//   read and written once.
// Numerics: products by fma, or exact pairs by vdpbf16ps, which flushes what is below 2^-126; one
//   accumulator an element. Gradients: float, at most kChain additions in a lane before they are
//   added to a double one; rounded to nearest even. Deterministic.
// Limits: none. Compiled once per CPU level, with ELVA_LEVEL set; nothing here has external linkage
//   but the table at the end.
// Reference: torch.mm, elva_kernels.reference._unit.
#include "kernels.h"
#include "simd.h"

namespace elva {
namespace {

// c is needed only at the end, and comes from far.
template <int R, class S>
inline void ask_for(const S* c, int64_t stride, int64_t columns) {
  for (int r = 0; r < R; ++r) {
    for (int64_t n = 0; n < columns; n += 64 / static_cast<int64_t>(sizeof(S)))
      __builtin_prefetch(c + r * stride + n, 1);
  }
}

// R rows of N vectors: as many accumulators as the level has registers for.
template <class V, int R, int N>
void multiply(const typename V::Scalar* a, const typename V::Scalar* b, int64_t steps,
              typename V::Scalar* c, int64_t c_stride, bool accumulate) {
  ask_for<R>(c, c_stride, N * V::kLanes);
  V sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = V::zero();
  }
  for (int64_t p = 0; p < steps; ++p) {
    V column[N];
    for (int n = 0; n < N; ++n) column[n] = V::load(b + n * V::kLanes);
    for (int r = 0; r < R; ++r) {
      const V row = V::broadcast(a[r]);
      for (int n = 0; n < N; ++n) sums[r][n] = fma(row, column[n], sums[r][n]);
    }
    a += R;
    b += N * V::kLanes;
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      typename V::Scalar* at = c + r * c_stride + n * V::kLanes;
      if (accumulate) sums[r][n] = add(V::load(at), sums[r][n]);
      sums[r][n].store(at);
    }
  }
}

#if ELVA_BF16_INSTRUCTIONS
inline __m512bh pairs(__m512i bits) {
  __m512bh out;
  memcpy(&out, &bits, sizeof(out));
  return out;
}

template <int R, int N>
void multiply_pairs(const Bf16Pair* a, const Bf16Pair* b, int64_t steps, float* c, int64_t c_stride,
                    bool accumulate) {
  ask_for<R>(c, c_stride, N * 16);
  __m512 sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < steps; ++p) {
    __m512i column[N];
    for (int n = 0; n < N; ++n) column[n] = _mm512_loadu_si512(b + n * 16);
    for (int r = 0; r < R; ++r) {
      const __m512i row = _mm512_set1_epi32(static_cast<int>(a[r].bits));
      for (int n = 0; n < N; ++n)
        sums[r][n] = _mm512_dpbf16_ps(sums[r][n], pairs(row), pairs(column[n]));
    }
    a += R;
    b += N * 16;
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      float* at = c + r * c_stride + n * 16;
      if (accumulate) sums[r][n] = _mm512_add_ps(_mm512_loadu_ps(at), sums[r][n]);
      _mm512_storeu_ps(at, sums[r][n]);
    }
  }
}
#endif

// To nearest even; NaN stays NaN.
inline uint32_t rounded(float x) {
  const uint32_t bits = bits_of(x);
  return x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fc0u;
}
inline float widened(uint32_t bits) { return float_of(bits << 16); }

// A pair of neighbours in depth; what the low halves add to their row's sum.
inline float split(float x, float y, float x_norm, float y_norm, Bf16Pair* high, Bf16Pair* low) {
  const uint32_t x_high = rounded(x), y_high = rounded(y);
  const float x_rest = x - widened(x_high), y_rest = y - widened(y_high);
  high->bits = x_high | y_high << 16;
  low->bits = rounded(x_rest) | rounded(y_rest) << 16;
  const float x_lost = x_rest * x_norm, y_lost = y_rest * y_norm;
  return x_lost * x_lost + y_lost * y_lost;
}

// Rows that lie side by side in memory, a pair in depth at a time: whole lines are read once.
void halves_of_columns(const HalvesJob& job, float* sums) {
  const int64_t steps = (job.depth + 1) / 2;
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t p = 2 * s, q = p + 1 < job.depth ? p + 1 : p;
    const float* first = job.rows + p * job.stride;
    const float* second = job.rows + q * job.stride;
    const float scale = job.scale[p], next_scale = q > p ? job.scale[q] : 0.0f;
    const float norm = job.norm[p], next_norm = job.norm[q];
    for (int64_t i = 0; i < job.count; i += job.width) {
      const int64_t left = job.count - i, there = left < job.width ? left : job.width;
      Bf16Pair* high = job.high + i * steps + s * job.width;
      Bf16Pair* low = job.low + i * steps + s * job.width;
      for (int64_t r = 0; r < there; ++r)
        sums[i + r] += split(first[i + r] * scale, second[i + r] * next_scale, norm, next_norm,
                             high + r, low + r);
    }
  }
}

// Rows of any strides: each is converted by pieces, which are then spread over its panel.
void halves_of_rows(const HalvesJob& job, float* sums) {
  constexpr int64_t kPiece = 64;
  const int64_t steps = (job.depth + 1) / 2;
  for (int64_t i = 0; i < job.count; ++i) {
    const int64_t panel = i / job.width * job.width * steps + i % job.width;
    float lanes[kPiece] = {};
    for (int64_t begin = 0; begin < job.depth; begin += 2 * kPiece) {
      const int64_t left = job.depth - begin, there = left < 2 * kPiece ? left : 2 * kPiece;
      float x[2 * kPiece] = {}, norm[2 * kPiece] = {};
      for (int64_t p = 0; p < there; ++p) {
        x[p] = job.rows[i * job.row_stride + (begin + p) * job.stride] * job.scale[begin + p];
        norm[p] = job.norm[begin + p];
      }
      Bf16Pair high[kPiece], low[kPiece];
      for (int64_t s = 0; s < kPiece; ++s)
        lanes[s] += split(x[2 * s], x[2 * s + 1], norm[2 * s], norm[2 * s + 1], high + s, low + s);
      for (int64_t s = 0; s < (there + 1) / 2; ++s) {
        job.high[panel + (begin / 2 + s) * job.width] = high[s];
        job.low[panel + (begin / 2 + s) * job.width] = low[s];
      }
    }
    for (int64_t s = 0; s < kPiece; ++s) sums[i] += lanes[s];
  }
}

void halves(const HalvesJob& job) {
  float sums[kMostRows] = {};
  const int64_t steps = (job.depth + 1) / 2;
  const int64_t tail = job.count % job.width;
  if (tail != 0) {
    Bf16Pair* ends[] = {job.high + (job.count - tail) * steps,
                        job.low + (job.count - tail) * steps};
    for (Bf16Pair* end : ends)
      memset(end, 0, static_cast<size_t>(steps * job.width) * sizeof(*end));
  }
  if (job.row_stride == 1) {
    halves_of_columns(job, sums);
  } else {
    halves_of_rows(job, sums);
  }
  for (int64_t i = 0; i < job.count; i += job.width) {
    bool within = true;
    for (int64_t r = i; r < i + job.width && r < job.count; ++r) within &= sums[r] <= job.allowed;
    job.matters[i / job.width] = !within;
  }
}

template <class Out>
void gradient_into(const Bf16GradientJob& job, Out* out) {
  constexpr int64_t kLanes = 16, kChain = 32 * kLanes;
  double lanes[kLanes] = {};
  const int64_t whole = job.dim - job.dim % kLanes;
  for (int64_t i = 0; i < whole;) {
    const int64_t end = i + kChain < whole ? i + kChain : whole;
    float sums[kLanes] = {};
    for (; i < end; i += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) sums[l] += widened(job.x[i + l].bits) * job.grad[i + l];
    }
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += static_cast<double>(sums[l]);
  }
  for (int64_t i = whole; i < job.dim; ++i)
    lanes[i - whole] += static_cast<double>(widened(job.x[i].bits) * job.grad[i]);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  const float along = static_cast<float>(lanes[0] * job.inverse_norm * job.inverse_norm);
  const float inverse = static_cast<float>(job.inverse_norm);
  if (job.exponent != 0) {
    const int half = job.exponent / 2;  // the power itself may leave the range of double
    const double first = __builtin_ldexp(1.0, -half);
    const double second = __builtin_ldexp(job.inverse_norm, half - job.exponent);
    for (int64_t i = 0; i < job.dim; ++i) {
      const float x = job.grad[i] - widened(job.x[i].bits) * along;
      from_double(static_cast<double>(x) * first * second, out + i);
    }
    return;
  }
  for (int64_t i = 0; i < job.dim; ++i) {
    const float x = (job.grad[i] - widened(job.x[i].bits) * along) * inverse;
    if constexpr (std::is_same_v<Out, float>) {
      out[i] = x;
    } else {
      out[i].bits = static_cast<uint16_t>(rounded(x));
    }
  }
}

void bf16_gradient(const Bf16GradientJob& job) {
  if (job.rounded) {
    gradient_into(job, static_cast<Bf16*>(job.out));
  } else {
    gradient_into(job, static_cast<float*>(job.out));
  }
}

void column_squares(const ColumnSquaresJob& job) {
  float sums[kColumnsOfNorms] = {};
  for (int64_t i = 0; i < job.count; ++i) {
    const Bf16* row = job.rows + i * job.stride;
    for (int64_t j = 0; j < job.columns; ++j) {
      const float x = widened(row[j].bits) * job.scale[i];
      sums[j] += x * x;
    }
  }
  memcpy(job.sums, sums, sizeof(sums));
}

void add_row(const Bf16* x, float factor, int64_t dim, float* out) {
  for (int64_t i = 0; i < dim; ++i) out[i] += factor * widened(x[i].bits);
}

}  // namespace

#if ELVA_LEVEL >= ELVA_LEVEL_AVX512
#define ELVA_TILE_ROWS 12
#define ELVA_TILE_VECTORS 2
#elif ELVA_LEVEL == ELVA_LEVEL_AVX2
#define ELVA_TILE_ROWS 6
#define ELVA_TILE_VECTORS 1
#else
#define ELVA_TILE_ROWS 2
#define ELVA_TILE_VECTORS 1
#endif

#if ELVA_BF16_INSTRUCTIONS
#define ELVA_PAIRS_TILE {12, 32, multiply_pairs<12, 2>}
#else
#define ELVA_PAIRS_TILE {0, 0, nullptr}
#endif

template <>
const MatrixKernels Level<ELVA_LEVEL>::matrix = {
    {ELVA_TILE_ROWS, ELVA_TILE_VECTORS * F32::kLanes,
     multiply<F32, ELVA_TILE_ROWS, ELVA_TILE_VECTORS>},
    {ELVA_TILE_ROWS, ELVA_TILE_VECTORS * F64::kLanes,
     multiply<F64, ELVA_TILE_ROWS, ELVA_TILE_VECTORS>},
    ELVA_PAIRS_TILE,
    halves,
    bf16_gradient,
    column_squares,
    add_row,
};

}  // namespace elva
