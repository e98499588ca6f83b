// What: the inner loops of codes: products of 8-bit rows and the bounds that they give, and the
//   mixing of a row before it is coded.
// Source: (16) and (17) of elva_kernels.reference.
// In: codes in [-128, 127], queries zero-padded; float rows.
// Out: int32 products, exact up to 65,536 columns; float bounds.
// Work split: the caller's thread, one job; R rows x 1 to 4 queries in registers a pass.
// Bytes: the codes once from memory in a block's first job, from the second-level cache in others.
// Numerics: integers. With VNNI unsigned by signed bytes: a row's codes + 128, whose surplus, 128
//   times the query's sum, is taken away at the end; signed bytes by sdot where NEON has it; else
//   products of 16 bits, two to a sum. Bounds
//   are rounded by less than SCORE_ERROR leaves room for. Additions of mix() come in one order on
//   every level.
// Limits: rows [count, dim] without gaps; nothing behind a row's end is read. Compiled once per CPU
//   level, with ELVA_LEVEL set; nothing here has external linkage but the table at the end.
// Reference: elva_kernels.reference.score_bounds, rotated.
#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace elva {
namespace {

#if ELVA_BF16_INSTRUCTIONS
// 64 codes a step, by VNNI.
struct Codes {
  static constexpr int64_t kStep = 64;
  static constexpr int kTileRows = 4;
  using Element = __m512i;
  using Sums = __m512i;
  static Sums zero() { return _mm512_setzero_si512(); }
  static Element row(const int8_t* p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
  }
  static Element row(const int8_t* p, int64_t count) {
    const __m512i codes = _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - count), p);
    return _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
  }
  static Element query(const int8_t* p) { return _mm512_loadu_si512(p); }
  static Sums add(Sums sums, Element row, Element query) {
    return _mm512_dpbusd_epi32(sums, row, query);
  }
  static int32_t total(Sums sums) { return _mm512_reduce_add_epi32(sums); }
  static void totals(const Sums* v, int32_t* out) {
    __m512i pairs[2];
    for (int i = 0; i < 2; ++i) {
      const __m512i a = v[2 * i], b = v[2 * i + 1];
      pairs[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    }
    const __m512i quarters = _mm512_add_epi32(_mm512_unpacklo_epi64(pairs[0], pairs[1]),
                                              _mm512_unpackhi_epi64(pairs[0], pairs[1]));
    const __m256i halves =
        _mm256_add_epi32(_mm512_castsi512_si256(quarters), _mm512_extracti64x4_epi64(quarters, 1));
    const __m128i sums =
        _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), sums);
  }
  static int32_t surplus(const int8_t* query, int64_t dim) {
    int32_t sum = 0;
    for (int64_t i = 0; i < dim; ++i) sum += query[i];
    return 128 * sum;
  }
};
#elif ELVA_LEVEL >= ELVA_LEVEL_AVX2
#if ELVA_LEVEL >= ELVA_LEVEL_AVX512
struct Words {
  static constexpr int64_t kStep = 32;
  static constexpr int kTileRows = 4;
  using Element = __m512i;
  static Element wide(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Element zero() { return _mm512_setzero_si512(); }
  static Element add(Element sums, Element a, Element b) {
    return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
  }
  static int32_t total(Element sums) { return _mm512_reduce_add_epi32(sums); }
};
#else
struct Words {
  static constexpr int64_t kStep = 16;
  static constexpr int kTileRows = 2;
  using Element = __m256i;
  static Element wide(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Element zero() { return _mm256_setzero_si256(); }
  static Element add(Element sums, Element a, Element b) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
  }
  static int32_t total(Element sums) {
    const __m128i halves =
        _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    const __m128i pairs = _mm_add_epi32(halves, _mm_unpackhi_epi64(halves, halves));
    return _mm_cvtsi128_si32(pairs) + _mm_extract_epi32(pairs, 1);
  }
};
#endif
struct Codes : Words {
  using Sums = Element;
  static Element row(const int8_t* p) { return wide(p); }
  static Element row(const int8_t* p, int64_t count) {
    int8_t padded[kStep] = {};
    memcpy(padded, p, static_cast<size_t>(count));
    return wide(padded);
  }
  static Element query(const int8_t* p) { return wide(p); }
  static void totals(const Sums* v, int32_t* out) {
    for (int i = 0; i < 4; ++i) out[i] = total(v[i]);
  }
  static int32_t surplus(const int8_t*, int64_t) { return 0; }
};
#elif ELVA_NEON_INSTRUCTIONS
struct Codes {
  static constexpr int64_t kStep = 16;
  static constexpr int kTileRows = 4;
  using Element = int8x16_t;
  using Sums = int32x4_t;
  static Sums zero() { return vdupq_n_s32(0); }
  static Element row(const int8_t* p) { return vld1q_s8(p); }
  static Element row(const int8_t* p, int64_t count) {
    int8_t padded[kStep] = {};
    memcpy(padded, p, static_cast<size_t>(count));
    return vld1q_s8(padded);
  }
  static Element query(const int8_t* p) { return vld1q_s8(p); }
  static Sums add(Sums sums, Element row, Element query) {
#if ELVA_LEVEL == ELVA_LEVEL_NEONDOT
    return vdotq_s32(sums, row, query);
#else
    sums = vpadalq_s16(sums, vmull_s8(vget_low_s8(row), vget_low_s8(query)));
    return vpadalq_s16(sums, vmull_high_s8(row, query));
#endif
  }
  static int32_t total(Sums sums) { return vaddvq_s32(sums); }
  static void totals(const Sums* v, int32_t* out) {
    vst1q_s32(out, vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3])));
  }
  static int32_t surplus(const int8_t*, int64_t) { return 0; }
};
#else
struct Codes {
  static constexpr int64_t kStep = 1;
  static constexpr int kTileRows = 2;
  using Element = int32_t;
  using Sums = int32_t;
  static Sums zero() { return 0; }
  static Element row(const int8_t* p) { return *p; }
  static Element row(const int8_t* p, int64_t) { return *p; }
  static Element query(const int8_t* p) { return *p; }
  static Sums add(Sums sums, Element row, Element query) { return sums + row * query; }
  static int32_t total(Sums sums) { return sums; }
  static void totals(const Sums* v, int32_t* out) {
    for (int i = 0; i < 4; ++i) out[i] = v[i];
  }
  static int32_t surplus(const int8_t*, int64_t) { return 0; }
};
#endif

constexpr int kRows = Codes::kTileRows;

// dot[c * stride + r] of C queries and kRows rows, of which the last ones may be one row again.
template <int C>
void tile(const int8_t* const* query_pointers, const int8_t* const* row_pointers, int64_t dim,
          int64_t ahead, const int32_t* surplus, int64_t stride, int32_t* dot) {
  const int8_t *queries[C], *rows[kRows];
  for (int c = 0; c < C; ++c) queries[c] = query_pointers[c];
  for (int r = 0; r < kRows; ++r) rows[r] = row_pointers[r];
  constexpr int kSums = (C * kRows + 3) / 4 * 4;
  Codes::Sums sums[kSums];
  for (int k = 0; k < kSums; k += 4) {
    for (int j = 0; j < 4; ++j) sums[k + j] = Codes::zero();
  }
  const int64_t whole = dim - dim % Codes::kStep;
  for (int64_t i = 0; i < whole; i += Codes::kStep) {
    Codes::Element elements[kRows];
    for (int r = 0; r < kRows; ++r) {
      elements[r] = Codes::row(rows[r] + i);
      if (ahead != 0) prefetch_far(rows[r] + i + ahead);
    }
    for (int c = 0; c < C; ++c) {
      const Codes::Element query = Codes::query(queries[c] + i);
      for (int r = 0; r < kRows; ++r)
        sums[c * kRows + r] = Codes::add(sums[c * kRows + r], elements[r], query);
    }
  }
  if (whole < dim) {
    for (int c = 0; c < C; ++c) {
      const Codes::Element query = Codes::query(queries[c] + whole);
      for (int r = 0; r < kRows; ++r) {
        const Codes::Element row = Codes::row(rows[r] + whole, dim - whole);
        sums[c * kRows + r] = Codes::add(sums[c * kRows + r], row, query);
      }
    }
  }
  int32_t totals[kSums];
  for (int k = 0; k < kSums; k += 4) Codes::totals(sums + k, totals + k);
  for (int c = 0; c < C; ++c) {
    for (int r = 0; r < kRows; ++r) dot[c * stride + r] = totals[c * kRows + r] - surplus[c];
  }
}

template <int C>
void scan_block(const CodeJob& job) {
  int64_t first = 0;
  for (; first + kRows <= job.count; first += kRows) {
    const int8_t* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = job.rows + (first + r) * job.dim;
    tile<C>(job.queries, rows, job.dim, job.ahead * job.dim, job.surplus, job.count,
            job.dot + first);
  }
  if (first == job.count) return;
  const int8_t* rows[kRows];
  for (int r = 0; r < kRows; ++r)
    rows[r] = job.rows + (first + r < job.count ? first + r : job.count - 1) * job.dim;
  int32_t dot[C * kRows];
  tile<C>(job.queries, rows, job.dim, 0, job.surplus, kRows, dot);
  for (int c = 0; c < C; ++c) {
    for (int64_t r = first; r < job.count; ++r)
      job.dot[c * job.count + r] = dot[c * kRows + r - first];
  }
}

void scan(const CodeJob& job) {
  switch (job.query_count) {
    case 4:
      scan_block<4>(job);
      break;
    case 3:
      scan_block<3>(job);
      break;
    case 2:
      scan_block<2>(job);
      break;
    default:
      scan_block<1>(job);
  }
  for (int32_t c = 0; c < job.query_count; ++c) {
    const float gain = job.gain[c], missed = job.missed[c];
    const int32_t* dot = job.dot + c * job.count;
    float* bound = job.bound + c * job.count;
    float largest = -INFINITY;
    for (int64_t r = 0; r < job.count; ++r) {
      const float x = gain * job.scale[r] * static_cast<float>(dot[r]) +
                      (missed * (1 + job.lost[r]) + job.lost[r]);
      bound[r] = x;
      largest = x > largest ? x : largest;
    }
    job.largest[c] = largest;
  }
}

int32_t dot(const int8_t* query, int32_t surplus, const int8_t* row, int64_t dim) {
  Codes::Sums sums = Codes::zero();
  const int64_t whole = dim - dim % Codes::kStep;
  for (int64_t i = 0; i < whole; i += Codes::kStep)
    sums = Codes::add(sums, Codes::row(row + i), Codes::query(query + i));
  if (whole < dim)
    sums = Codes::add(sums, Codes::row(row + whole, dim - whole), Codes::query(query + whole));
  return Codes::total(sums) - surplus;
}

template <class T>
float widen(const void* row, int64_t dim, float* out) {
  const T* data = static_cast<const T*>(row);
  const int64_t whole = dim - dim % F32::kLanes;
  for (int64_t i = 0; i < whole; i += F32::kLanes) F32::load(data + i).store(out + i);
  if (whole < dim) {
    alignas(64) T padded[F32::kLanes] = {};
    alignas(64) float wide[F32::kLanes];
    memcpy(padded, data + whole, static_cast<size_t>(dim - whole) * sizeof(T));
    F32::load(padded).store(wide);
    memcpy(out + whole, wide, static_cast<size_t>(dim - whole) * sizeof(float));
  }
  // As integers, magnitudes are in their order, with infinity and NaN behind all numbers.
  uint32_t largest = 0;
  for (int64_t i = 0; i < dim; ++i) {
    uint32_t bits;
    memcpy(&bits, out + i, sizeof(bits));
    bits &= 0x7fffffffU;
    largest = bits > largest ? bits : largest;
  }
  float magnitude;
  memcpy(&magnitude, &largest, sizeof(magnitude));
  return magnitude;
}

double square(const float* row, int64_t dim) {
  constexpr int64_t kLanes = 16;
  double sums[kLanes] = {};
  const int64_t whole = dim - dim % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const double x = row[i + j];
      sums[j] += x * x;
    }
  }
  double sum = 0;
  for (int64_t i = whole; i < dim; ++i) sum += static_cast<double>(row[i]) * row[i];
  for (int64_t j = 0; j < kLanes; ++j) sum += sums[j];
  return sum;
}

// To the nearest whole number, ties to even: below 2^22 adding 1.5 * 2^23 leaves no other bits.
float nearest(float x) {
  constexpr float kShift = 12582912.0F;
  return (x + kShift) - kShift;
}

double round(const float* row, int64_t dim, float inverse, int8_t* code, int8_t* fine) {
  constexpr int64_t kLanes = 16;
  float sums[kLanes] = {};
  const auto one = [&](int64_t i, int64_t lane) {
    const float steps = row[i] * inverse;
    float whole = nearest(steps);
    whole = whole > 127.0F ? 127.0F : whole < -127.0F ? -127.0F : whole;
    float left = steps - whole;
    code[i] = static_cast<int8_t>(static_cast<int32_t>(whole));
    if (fine != nullptr) {
      float part = nearest(left * kFineSteps);
      part = part > 127.0F ? 127.0F : part;
      fine[i] = static_cast<int8_t>(static_cast<int32_t>(part));
      left -= part / kFineSteps;
    }
    sums[lane] += left * left;
  };
  const int64_t rest = dim - dim % kLanes;
  for (int64_t i = 0; i < rest; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) one(i + j, j);
  }
  for (int64_t i = rest; i < dim; ++i) one(i, i - rest);
  double sum = 0;
  for (int64_t j = 0; j < kLanes; ++j) sum += sums[j];
  return sqrt(sum);
}

// Sums and differences of elements `half` apart.
void butterfly(float* row, int64_t size, int64_t half) {
  for (int64_t first = 0; first < size; first += 2 * half) {
    float *left = row + first, *right = left + half;
    for (int64_t i = 0; i < half; ++i) {
      const float a = left[i], b = right[i];
      left[i] = a + b;
      right[i] = a - b;
    }
  }
}

// Of 16 elements, whose distances are constants: in registers.
template <int half>
void butterfly_of_16(const float* in, float* out) {
  for (int i = 0; i < 16; ++i) {
    const float a = in[i & ~half], b = in[i | half];
    out[i] = (i & half) == 0 ? a + b : a - b;
  }
}

void mix(float* row, int64_t size) {
  const float factor = static_cast<float>(1 / sqrt(static_cast<double>(size)));
  int64_t half = size / 2;
  for (; half >= (size < 16 ? 1 : 16); half /= 2) butterfly(row, size, half);
  for (int64_t first = 0; half > 0 && first < size; first += 16) {
    float a[16], b[16];
    butterfly_of_16<8>(row + first, a);
    butterfly_of_16<4>(a, b);
    butterfly_of_16<2>(b, a);
    butterfly_of_16<1>(a, row + first);
  }
  for (int64_t i = 0; i < size; ++i) row[i] *= factor;
}

}  // namespace

template <>
const CodeKernels Level<ELVA_LEVEL>::codes = {
    scan,   dot, Codes::surplus, {widen<Bf16>, widen<Fp16>, widen<float>, nullptr},
    square, mix, round,
};

}  // namespace elva
