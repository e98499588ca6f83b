// Vectors of 16 float and 8 double in AVX-512 (F, BW, DQ, VL); with BF16 also the rounding store.
// See simd.h.
#ifndef ELVA_CPU_SIMD_AVX512_H_
#define ELVA_CPU_SIMD_AVX512_H_

#include <immintrin.h>

namespace elva {
namespace {

struct F32 {
  using Scalar = float;
  static constexpr int64_t kLanes = 16;
  __m512 v;

  static F32 zero() { return {_mm512_setzero_ps()}; }
  static F32 broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F32 load(const Bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static F32 load(const Fp16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  // Double [16] += this.
  void add_to(double* p) const {
    const __m256 high = _mm512_extractf32x8_ps(v, 1);
    _mm512_storeu_pd(p,
                     _mm512_add_pd(_mm512_loadu_pd(p), _mm512_cvtps_pd(_mm512_castps512_ps256(v))));
    _mm512_storeu_pd(p + 8, _mm512_add_pd(_mm512_loadu_pd(p + 8), _mm512_cvtps_pd(high)));
  }
  static F32 rounded(const double* p) {
    const __m256 low = _mm512_cvtpd_ps(_mm512_loadu_pd(p)),
                 high = _mm512_cvtpd_ps(_mm512_loadu_pd(p + 8));
    return {_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)};
  }
};

inline F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 clamp(F32 x, float limit) {
  return {_mm512_min_ps(_mm512_max_ps(x.v, _mm512_set1_ps(-limit)), _mm512_set1_ps(limit))};
}
inline F32 exponent_of(F32 x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 23))};
}

struct F64 {
  using Scalar = double;
  static constexpr int64_t kLanes = 8;
  __m512d v;

  static F64 zero() { return {_mm512_setzero_pd()}; }
  static F64 broadcast(double x) { return {_mm512_set1_pd(x)}; }
  static F64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void add_to(double* p) const { _mm512_storeu_pd(p, _mm512_add_pd(_mm512_loadu_pd(p), v)); }
  static F64 rounded(const double* p) { return load(p); }
};

inline F64 mul(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline F64 add(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
inline F64 sub(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline F64 div(F64 a, F64 b) { return {_mm512_div_pd(a.v, b.v)}; }
inline F64 clamp(F64 x, double limit) {
  return {_mm512_min_pd(_mm512_max_pd(x.v, _mm512_set1_pd(-limit)), _mm512_set1_pd(limit))};
}
inline F64 exponent_of(F64 x) {
  return {_mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(x.v), 52))};
}

inline void add_sums(const F32* v, double* p) {
  __m512 pairs[2];
  for (int i = 0; i < 2; ++i) {
    const __m512 a = v[2 * i].v, b = v[2 * i + 1].v;
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  const __m512d first = _mm512_castps_pd(pairs[0]), second = _mm512_castps_pd(pairs[1]);
  const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)),
                                        _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
  const __m256 halves =
      _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
  _mm256_storeu_pd(p, _mm256_add_pd(_mm256_loadu_pd(p), _mm256_cvtps_pd(sums)));
}

inline void add_sums(const F64* v, double* p) {
  for (int i = 0; i < 4; i += 2) {
    const __m512d pairs = _mm512_add_pd(_mm512_unpacklo_pd(v[i].v, v[i + 1].v),
                                        _mm512_unpackhi_pd(v[i].v, v[i + 1].v));
    const __m256d halves =
        _mm256_add_pd(_mm512_castpd512_pd256(pairs), _mm512_extractf64x4_pd(pairs, 1));
    const __m128d sums =
        _mm_add_pd(_mm256_castpd256_pd128(halves), _mm256_extractf128_pd(halves, 1));
    _mm_storeu_pd(p + i, _mm_add_pd(_mm_loadu_pd(p + i), sums));
  }
}

inline __m512i line_of(const F32* v, const float*) { return _mm512_castps_si512(v[0].v); }
inline __m512i line_of(const F64* v, const double*) { return _mm512_castpd_si512(v[0].v); }
inline __m512i line_of(const F32* v, const Fp16*) {
  const __m256i low = _mm512_cvtps_ph(v[0].v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i high = _mm512_cvtps_ph(v[1].v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
// A line of bf16 is held as two vectors of alternating quarters: that is what unpacking gives in
// one instruction.
inline __m512i line_of(const F32* v, const Bf16*) {
#if ELVA_BF16_INSTRUCTIONS
  const __m512bh halves = _mm512_cvtne2ps_pbh(v[1].v, v[0].v);
  __m512i bits;
  memcpy(&bits, &halves, sizeof(bits));
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), bits);
#else
  __m512i half[2];
  for (int i = 0; i < 2; ++i) {
    const __m512i bits = _mm512_castps_si512(v[i].v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    half[i] = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  }
  return _mm512_packus_epi32(half[0], half[1]);
#endif
}

template <class T, class V>
inline void store_line(T* p, const V* v, bool stream) {
  const __m512i line = line_of(v, p);
  if (stream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), line);
  } else {
    _mm512_storeu_si512(p, line);
  }
}

template <class T, class V>
inline void load_line(const T* p, V* v) {
  for (int64_t i = 0; i < 64 / static_cast<int64_t>(sizeof(T)) / V::kLanes; ++i)
    v[i] = V::load(p + i * V::kLanes);
}

inline void load_line(const Bf16* p, F32* v) {
  const __m512i line = _mm512_loadu_si512(p);
  v[0].v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(_mm512_setzero_si512(), line));
  v[1].v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(_mm512_setzero_si512(), line));
}

// Doubles in the order of the elements += a line.
template <class T, class V>
inline void add_line(double* p, const V* v) {
  if constexpr (std::is_same_v<T, Bf16>) {
    const __m512 low = _mm512_shuffle_f32x4(v[0].v, v[1].v, 0x44),
                 high = _mm512_shuffle_f32x4(v[0].v, v[1].v, 0xee);
    F32{_mm512_shuffle_f32x4(low, low, 0xd8)}.add_to(p);
    F32{_mm512_shuffle_f32x4(high, high, 0xd8)}.add_to(p + 16);
  } else {
    for (int64_t i = 0; i < 64 / static_cast<int64_t>(sizeof(T)) / V::kLanes; ++i)
      v[i].add_to(p + i * V::kLanes);
  }
}

// A line out of doubles in the order of the elements.
template <class T, class V>
inline void round_line(const double* p, V* v) {
  for (int64_t i = 0; i < 64 / static_cast<int64_t>(sizeof(T)) / V::kLanes; ++i)
    v[i] = V::rounded(p + i * V::kLanes);
  if constexpr (std::is_same_v<T, Bf16>) {
    const __m512 first = v[0].v, second = v[1].v;
    v[0].v = _mm512_shuffle_f32x4(first, second, 0x88);
    v[1].v = _mm512_shuffle_f32x4(first, second, 0xdd);
  }
}

inline void store_fence() { _mm_sfence(); }
// Into the second-level cache.
inline void prefetch_far(const void* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
}
// Into the first-level cache.
inline void prefetch(const void* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace
}  // namespace elva

#endif  // ELVA_CPU_SIMD_AVX512_H_
