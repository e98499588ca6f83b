// What: the inner loops of matrix products: tiles out of packed panels, floats split into two bf16
//   halves, and the gradient through a bf16 row's norm.
// Source: the dots of cosine (8) of elva_kernels.reference, and their gradients.
// In: packed panels of words, rows of float or bf16: see matrix_kernels.h.
// Out: tiles of c, panels of halves, gradient rows: see matrix_kernels.h.
// Work split: the caller's thread, one job.
// Bytes: a panel of b from the first-level cache, one of a from the second-level one; a tile of c
//   read and written once.
// Numerics: products by fma, or exact pairs by vdpbf16ps or tdpbf16ps, which flush what is below
//   2^-126; one accumulator an element, of tdpbf16ps two that are added every 32 elements.
//   Gradients: float, at most kChain additions in a lane before they are added to a double one;
//   rounded to nearest even. Deterministic.
// Limits: none. Compiled once per CPU level, with ELVA_LEVEL set; nothing here has external linkage
//   but the table at the end.
// Reference: torch.mm, elva_kernels.reference._unit.
#include "kernels.h"
#include "lane_sums.h"
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

// R rows of N vectors, of a panel of kPanel rows.
template <class V, int R, int N, int kPanel>
void multiply_rows(const typename V::Scalar* a, const typename V::Scalar* b, int64_t steps,
                   typename V::Scalar* c, int64_t c_stride, bool accumulate) {
  ask_for<R>(c, c_stride, N * V::kLanes);
  V sums[R][N];
  ELVA_UNROLL
  for (int r = 0; r < R; ++r) {
    ELVA_UNROLL
    for (int n = 0; n < N; ++n) sums[r][n] = V::zero();
  }
  for (int64_t p = 0; p < steps; ++p) {
    V column[N];
    ELVA_UNROLL
    for (int n = 0; n < N; ++n) column[n] = V::load(b + n * V::kLanes);
    ELVA_UNROLL
    for (int r = 0; r < R; ++r) {
      const V row = V::broadcast(a[r]);
      ELVA_UNROLL
      for (int n = 0; n < N; ++n) sums[r][n] = fma(row, column[n], sums[r][n]);
    }
    a += kPanel;
    b += N * V::kLanes;
  }
  ELVA_UNROLL
  for (int r = 0; r < R; ++r) {
    ELVA_UNROLL
    for (int n = 0; n < N; ++n) {
      typename V::Scalar* at = c + r * c_stride + n * V::kLanes;
      if (accumulate) sums[r][n] = add(V::load(at), sums[r][n]);
      sums[r][n].store(at);
    }
  }
}

constexpr int row_step(int rows) { return rows % 3 == 0 ? rows / 3 : rows / 2; }

// R rows of N vectors: as many accumulators as the level has registers for; or a part of them.
template <class V, int R, int N>
void multiply(const typename V::Scalar* a, const typename V::Scalar* b, int64_t steps,
              typename V::Scalar* c, int64_t c_stride, bool accumulate, int64_t rows) {
  constexpr int kStep = row_step(R);
  if (rows == R) return multiply_rows<V, R, N, R>(a, b, steps, c, c_stride, accumulate);
  if (rows == kStep) return multiply_rows<V, kStep, N, R>(a, b, steps, c, c_stride, accumulate);
  multiply_rows<V, R - kStep, N, R>(a, b, steps, c, c_stride, accumulate);
}

#if ELVA_BF16_INSTRUCTIONS && !ELVA_AMX_INSTRUCTIONS
inline __m512bh pairs(__m512i bits) {
  __m512bh out;
  memcpy(&out, &bits, sizeof(out));
  return out;
}

template <int R, int N>
void multiply_pairs(const Bf16Pair* a, const Bf16Pair* b, int64_t steps, float* c, int64_t c_stride,
                    bool accumulate, int64_t) {
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

#if ELVA_AMX_INSTRUCTIONS
// Of each of the eight tiles: 16 rows of 64 bytes. In assembler: no compiler flag is needed, and
// the compiler keeps its hands off the tiles.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void begin_tiles() {
  const TileShapes shapes;
  __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
}
void end_tiles() { __asm__ volatile("tilerelease"); }

#define ELVA_LOAD_TILE(tile, p, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%" tile : : "r"(p), "r"(stride) : "memory")
#define ELVA_STORE_TILE(tile, p, stride) \
  __asm__ volatile("tilestored %%" tile ", (%0,%1,1)" : : "r"(p), "r"(stride) : "memory")

// 2 x 2 tiles of c; a [32, steps], b [steps, 32], steps a multiple of 16.
void multiply_tiles(const Bf16Pair* a, const Bf16Pair* b, int64_t steps, float* c, int64_t c_stride,
                    bool accumulate, int64_t) {
  ask_for<32>(c, c_stride, 32);
  const int64_t a_bytes = steps * 4, b_bytes = 32 * 4;
  __asm__ volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3");
  for (int64_t s = 0; s < steps; s += 16) {
    ELVA_LOAD_TILE("tmm4", a + s, a_bytes);
    ELVA_LOAD_TILE("tmm6", b + s * 32, b_bytes);
    ELVA_LOAD_TILE("tmm7", b + s * 32 + 16, b_bytes);
    ELVA_LOAD_TILE("tmm5", a + 16 * steps + s, a_bytes);
    __asm__ volatile(
        "tdpbf16ps %tmm6, %tmm4, %tmm0\n\t"
        "tdpbf16ps %tmm7, %tmm4, %tmm1\n\t"
        "tdpbf16ps %tmm6, %tmm5, %tmm2\n\t"
        "tdpbf16ps %tmm7, %tmm5, %tmm3");
  }
  alignas(64) float sums[32][32];
  float* out = accumulate ? sums[0] : c;
  const int64_t stride = accumulate ? 32 : c_stride, bytes = stride * 4;
  ELVA_STORE_TILE("tmm0", out, bytes);
  ELVA_STORE_TILE("tmm1", out + 16, bytes);
  ELVA_STORE_TILE("tmm2", out + 16 * stride, bytes);
  ELVA_STORE_TILE("tmm3", out + 16 * stride + 16, bytes);
  if (!accumulate) return;
  for (int64_t r = 0; r < 32; ++r) {
    for (int64_t n = 0; n < 32; n += 16) {
      float* at = c + r * c_stride + n;
      _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), _mm512_load_ps(&sums[r][n])));
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

// `count` rows' words at one step of a panel.
inline void put(const HalvesJob& job, const Bf16Pair* words, int64_t count, int64_t step,
                Bf16Pair* panel) {
  if (job.in_rows) {
    for (int64_t r = 0; r < count; ++r) panel[r * job.steps + step] = words[r];
  } else {
    memcpy(panel + step * job.width, words, static_cast<size_t>(count) * sizeof(*words));
  }
}

// Rows that lie side by side in memory, a pair in depth at a time: whole lines are read once.
void halves_of_columns(const HalvesJob& job, float* sums) {
  const int64_t steps = (job.depth + 1) / 2;
  Bf16Pair high[kMostPanelRows], low[kMostPanelRows];
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t p = 2 * s, q = p + 1 < job.depth ? p + 1 : p;
    const float* first = job.rows + p * job.stride;
    const float* second = job.rows + q * job.stride;
    const float scale = job.scale[p], next_scale = q > p ? job.scale[q] : 0.0f;
    const float norm = job.norm[p], next_norm = job.norm[q];
    for (int64_t i = 0; i < job.count; i += job.width) {
      const int64_t left = job.count - i, there = left < job.width ? left : job.width;
      for (int64_t r = 0; r < there; ++r)
        sums[i + r] += split(first[i + r] * scale, second[i + r] * next_scale, norm, next_norm,
                             high + r, low + r);
      put(job, high, there, s, job.high + i * job.steps);
      put(job, low, there, s, job.low + i * job.steps);
    }
  }
}

// Rows of any strides: each is converted by pieces, which are then spread over its panel.
void halves_of_rows(const HalvesJob& job, float* sums) {
  constexpr int64_t kPiece = 64;
  const int64_t row_step = job.in_rows ? job.steps : 1, word_step = job.in_rows ? 1 : job.width;
  for (int64_t i = 0; i < job.count; ++i) {
    const int64_t r = i % job.width, begin_of_row = (i - r) * job.steps + r * row_step;
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
        job.high[begin_of_row + (begin / 2 + s) * word_step] = high[s];
        job.low[begin_of_row + (begin / 2 + s) * word_step] = low[s];
      }
    }
    for (int64_t s = 0; s < kPiece; ++s) sums[i] += lanes[s];
  }
}

void halves(const HalvesJob& job) {
  float sums[kMostRows] = {};
  const bool behind = (job.depth + 1) / 2 < job.steps;
  const int64_t tail = job.count % job.width, whole = behind ? 0 : job.count - tail;
  const int64_t padded = (job.count + job.width - 1) / job.width * job.width;
  const size_t bytes = static_cast<size_t>((padded - whole) * job.steps) * sizeof(*job.high);
  memset(job.high + whole * job.steps, 0, bytes);
  memset(job.low + whole * job.steps, 0, bytes);
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

void f32_unit(const float* x, int64_t dim, float* unit, double* norm) {
  const double square = sum_of(dim, [&](int64_t i) {
    const double at = static_cast<double>(x[i]);
    return at * at;
  });
  const bool finite = __builtin_isfinite(square);
  norm[0] = square == 0 ? 0.0 : finite ? 1 / __builtin_sqrt(square) : __builtin_nan("");
  norm[1] = 0;
  if (square == 0 || !finite) {
    memset(unit, 0, static_cast<size_t>(dim) * sizeof(*unit));
    return;
  }
  const double inverse = norm[0];
  for (int64_t i = 0; i < dim; ++i)
    unit[i] = static_cast<float>(static_cast<double>(x[i]) * inverse);
}

void f32_gradient(const float* unit, const float* grad, double inverse_norm, int64_t dim,
                  float* out) {
  if (!(inverse_norm != 0)) {
    memset(out, 0, static_cast<size_t>(dim) * sizeof(*out));
    return;
  }
  const double dot = sum_of(
      dim, [&](int64_t i) { return static_cast<double>(unit[i]) * static_cast<double>(grad[i]); });
  for (int64_t i = 0; i < dim; ++i) {
    const double along = static_cast<double>(unit[i]) * dot;
    out[i] = static_cast<float>((static_cast<double>(grad[i]) - along) * inverse_norm);
  }
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
#elif ELVA_NEON_INSTRUCTIONS
#define ELVA_TILE_ROWS 4
#define ELVA_TILE_VECTORS 1
#else
#define ELVA_TILE_ROWS 2
#define ELVA_TILE_VECTORS 1
#endif

#if ELVA_AMX_INSTRUCTIONS
#define ELVA_PAIRS_TILE {32, 32, 32, multiply_tiles, 16, true, begin_tiles, end_tiles}
#elif ELVA_BF16_INSTRUCTIONS
#define ELVA_PAIRS_TILE {12, 32, 12, multiply_pairs<12, 2>, 1, false, nullptr, nullptr}
#else
#define ELVA_PAIRS_TILE {0, 0, 0, nullptr, 1, false, nullptr, nullptr}
#endif

template <>
const MatrixKernels Level<ELVA_LEVEL>::matrix = {
    {ELVA_TILE_ROWS, ELVA_TILE_VECTORS * F32::kLanes, row_step(ELVA_TILE_ROWS),
     multiply<F32, ELVA_TILE_ROWS, ELVA_TILE_VECTORS>, 1, false, nullptr, nullptr},
    {ELVA_TILE_ROWS, ELVA_TILE_VECTORS * F64::kLanes, row_step(ELVA_TILE_ROWS),
     multiply<F64, ELVA_TILE_ROWS, ELVA_TILE_VECTORS>, 1, false, nullptr, nullptr},
    ELVA_PAIRS_TILE,
    halves,
    bf16_gradient,
    column_squares,
    f32_unit,
    f32_gradient,
    add_row,
};

}  // namespace elva
