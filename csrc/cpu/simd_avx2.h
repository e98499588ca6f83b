// Vectors of 16 float and 8 double in pairs of AVX2 registers (AVX2, FMA, F16C). See simd.h.
#ifndef ELVA_CPU_SIMD_AVX2_H_
#define ELVA_CPU_SIMD_AVX2_H_

#include <immintrin.h>

namespace elva {
namespace {

inline __m256 widened(__m128i bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
}

// Four doubles += the four floats.
inline void add_floats(double* p, __m128 x) {
  _mm256_storeu_pd(p, _mm256_add_pd(_mm256_loadu_pd(p), _mm256_cvtps_pd(x)));
}

struct F32 {
  using Scalar = float;
  static constexpr int64_t kLanes = 16;
  __m256 v[2];

  static F32 zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
  static F32 broadcast(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
  static F32 load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
  static F32 load(const Bf16* p) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(p);
    return {{widened(_mm_loadu_si128(halves)), widened(_mm_loadu_si128(halves + 1))}};
  }
  static F32 load(const Fp16* p) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(p);
    return {
        {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))}};
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, v[0]);
    _mm256_storeu_ps(p + 8, v[1]);
  }
  void add_to(double* p) const {
    for (int i = 0; i < 2; ++i) {
      add_floats(p + 8 * i, _mm256_castps256_ps128(v[i]));
      add_floats(p + 8 * i + 4, _mm256_extractf128_ps(v[i], 1));
    }
  }
  static F32 rounded(const double* p) {
    F32 out;
    for (int i = 0; i < 2; ++i) {
      const __m128 low = _mm256_cvtpd_ps(_mm256_loadu_pd(p + 8 * i));
      const __m128 high = _mm256_cvtpd_ps(_mm256_loadu_pd(p + 8 * i + 4));
      out.v[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
    }
    return out;
  }
};

inline F32 mul(F32 a, F32 b) {
  return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}};
}
inline F32 fma(F32 a, F32 b, F32 c) {
  return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
}
inline F32 add(F32 a, F32 b) {
  return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}};
}
inline F32 sub(F32 a, F32 b) {
  return {{_mm256_sub_ps(a.v[0], b.v[0]), _mm256_sub_ps(a.v[1], b.v[1])}};
}
inline F32 div(F32 a, F32 b) {
  return {{_mm256_div_ps(a.v[0], b.v[0]), _mm256_div_ps(a.v[1], b.v[1])}};
}
inline F32 clamp(F32 x, float limit) {
  const __m256 most = _mm256_set1_ps(limit), least = _mm256_set1_ps(-limit);
  for (__m256& half : x.v) half = _mm256_min_ps(_mm256_max_ps(half, least), most);
  return x;
}
inline F32 exponent_of(F32 x) {
  for (__m256& half : x.v) {
    half = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(half), 23));
  }
  return x;
}

struct F64 {
  using Scalar = double;
  static constexpr int64_t kLanes = 8;
  __m256d v[2];

  static F64 zero() { return {{_mm256_setzero_pd(), _mm256_setzero_pd()}}; }
  static F64 broadcast(double x) { return {{_mm256_set1_pd(x), _mm256_set1_pd(x)}}; }
  static F64 load(const double* p) { return {{_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}}; }
  void store(double* p) const {
    _mm256_storeu_pd(p, v[0]);
    _mm256_storeu_pd(p + 4, v[1]);
  }
  void add_to(double* p) const {
    for (int i = 0; i < 2; ++i)
      _mm256_storeu_pd(p + 4 * i, _mm256_add_pd(_mm256_loadu_pd(p + 4 * i), v[i]));
  }
  static F64 rounded(const double* p) { return load(p); }
};

inline F64 mul(F64 a, F64 b) {
  return {{_mm256_mul_pd(a.v[0], b.v[0]), _mm256_mul_pd(a.v[1], b.v[1])}};
}
inline F64 fma(F64 a, F64 b, F64 c) {
  return {{_mm256_fmadd_pd(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_pd(a.v[1], b.v[1], c.v[1])}};
}
inline F64 add(F64 a, F64 b) {
  return {{_mm256_add_pd(a.v[0], b.v[0]), _mm256_add_pd(a.v[1], b.v[1])}};
}
inline F64 sub(F64 a, F64 b) {
  return {{_mm256_sub_pd(a.v[0], b.v[0]), _mm256_sub_pd(a.v[1], b.v[1])}};
}
inline F64 div(F64 a, F64 b) {
  return {{_mm256_div_pd(a.v[0], b.v[0]), _mm256_div_pd(a.v[1], b.v[1])}};
}
inline F64 clamp(F64 x, double limit) {
  const __m256d most = _mm256_set1_pd(limit), least = _mm256_set1_pd(-limit);
  for (__m256d& half : x.v) half = _mm256_min_pd(_mm256_max_pd(half, least), most);
  return x;
}
inline F64 exponent_of(F64 x) {
  for (__m256d& half : x.v) {
    half = _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(half), 52));
  }
  return x;
}

inline void add_sums(const F32* v, double* p) {
  __m256 pairs[2];
  for (int i = 0; i < 2; ++i) {
    const __m256 a = _mm256_add_ps(v[2 * i].v[0], v[2 * i].v[1]);
    const __m256 b = _mm256_add_ps(v[2 * i + 1].v[0], v[2 * i + 1].v[1]);
    pairs[i] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  const __m256d first = _mm256_castps_pd(pairs[0]), second = _mm256_castps_pd(pairs[1]);
  const __m256 halves = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(first, second)),
                                      _mm256_castpd_ps(_mm256_unpackhi_pd(first, second)));
  add_floats(p, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

inline void add_sums(const F64* v, double* p) {
  for (int i = 0; i < 4; i += 2) {
    const __m256d a = _mm256_add_pd(v[i].v[0], v[i].v[1]);
    const __m256d b = _mm256_add_pd(v[i + 1].v[0], v[i + 1].v[1]);
    const __m256d halves = _mm256_add_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b));
    const __m128d sums =
        _mm_add_pd(_mm256_castpd256_pd128(halves), _mm256_extractf128_pd(halves, 1));
    _mm_storeu_pd(p + i, _mm_add_pd(_mm_loadu_pd(p + i), sums));
  }
}

inline __m256i bf16_bits(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
}

// The two 32-byte halves of a line.
inline void line_of(const F32* v, const float*, __m256i* half) {
  for (int i = 0; i < 2; ++i) half[i] = _mm256_castps_si256(v[0].v[i]);
}
inline void line_of(const F64* v, const double*, __m256i* half) {
  for (int i = 0; i < 2; ++i) half[i] = _mm256_castpd_si256(v[0].v[i]);
}
inline void line_of(const F32* v, const Fp16*, __m256i* half) {
  for (int i = 0; i < 2; ++i) {
    const __m128i low = _mm256_cvtps_ph(v[i].v[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m128i high = _mm256_cvtps_ph(v[i].v[1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    half[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  }
}
// A vector of bf16 is held as two registers of alternating quarters: that is what unpacking gives
// in one instruction.
inline void line_of(const F32* v, const Bf16*, __m256i* half) {
  for (int i = 0; i < 2; ++i)
    half[i] = _mm256_packus_epi32(bf16_bits(v[i].v[0]), bf16_bits(v[i].v[1]));
}

// From that order to the order of the elements, and back.
inline F32 swap_quarters(F32 x) {
  return {
      {_mm256_permute2f128_ps(x.v[0], x.v[1], 0x20), _mm256_permute2f128_ps(x.v[0], x.v[1], 0x31)}};
}

template <class T, class V>
inline void store_line(T* p, const V* v, bool stream) {
  __m256i half[2];
  line_of(v, p, half);
  __m256i* out = reinterpret_cast<__m256i*>(p);
  for (int i = 0; i < 2; ++i) {
    if (stream) {
      _mm256_stream_si256(out + i, half[i]);
    } else {
      _mm256_storeu_si256(out + i, half[i]);
    }
  }
}

template <class T, class V>
inline void load_line(const T* p, V* v) {
  for (int64_t i = 0; i < 64 / static_cast<int64_t>(sizeof(T)) / V::kLanes; ++i)
    v[i] = V::load(p + i * V::kLanes);
}

inline void load_line(const Bf16* p, F32* v) {
  for (int i = 0; i < 2; ++i) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
    v[i].v[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(_mm256_setzero_si256(), half));
    v[i].v[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(_mm256_setzero_si256(), half));
  }
}

// Doubles in the order of the elements += a line.
template <class T, class V>
inline void add_line(double* p, const V* v) {
  for (int64_t i = 0; i < 64 / static_cast<int64_t>(sizeof(T)) / V::kLanes; ++i) {
    if constexpr (std::is_same_v<T, Bf16>) {
      swap_quarters(v[i]).add_to(p + i * V::kLanes);
    } else {
      v[i].add_to(p + i * V::kLanes);
    }
  }
}

// A line out of doubles in the order of the elements.
template <class T, class V>
inline void round_line(const double* p, V* v) {
  for (int64_t i = 0; i < 64 / static_cast<int64_t>(sizeof(T)) / V::kLanes; ++i) {
    v[i] = V::rounded(p + i * V::kLanes);
    if constexpr (std::is_same_v<T, Bf16>) v[i] = swap_quarters(v[i]);
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

#endif  // ELVA_CPU_SIMD_AVX2_H_
