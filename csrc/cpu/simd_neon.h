// Vectors of 16 float and 8 double in fours of NEON registers (Armv8-A, 64 bits: every such
// processor has them). See simd.h.
#ifndef ELVA_CPU_SIMD_NEON_H_
#define ELVA_CPU_SIMD_NEON_H_

#include <arm_neon.h>

namespace elva {
namespace {

// The four registers of a vector. They are copied one by one: the struct as a whole gcc 12 moves
// through memory, and keeps there what a loop sums up.
template <class Register>
struct Parts {
  Register v[4];
  Parts() = default;
  Parts(Register a, Register b, Register c, Register d) { set(a, b, c, d); }
  Parts(const Parts& x) { set(x.v[0], x.v[1], x.v[2], x.v[3]); }
  Parts& operator=(const Parts& x) {
    set(x.v[0], x.v[1], x.v[2], x.v[3]);
    return *this;
  }

 private:
  void set(Register a, Register b, Register c, Register d) {
    v[0] = a;
    v[1] = b;
    v[2] = c;
    v[3] = d;
  }
};

// part(0) to part(3).
template <class V, class Part>
inline V each(const Part& part) {
  return V(part(0), part(1), part(2), part(3));
}

struct F32 : Parts<float32x4_t> {
  using Parts::Parts;
  using Scalar = float;
  static constexpr int64_t kLanes = 16;

  static F32 zero() { return broadcast(0); }
  static F32 broadcast(float x) {
    return each<F32>([=](int) { return vdupq_n_f32(x); });
  }
  static F32 load(const float* p) {
    return each<F32>([=](int i) { return vld1q_f32(p + 4 * i); });
  }
  static F32 load(const Bf16* p) {
    const uint16x8_t low = vld1q_u16(&p->bits), high = vld1q_u16(&p[8].bits);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(low), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(low, 16)),
            vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(high), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(high, 16))};
  }
  static F32 load(const Fp16* p) {
    const float16x8_t low = vreinterpretq_f16_u16(vld1q_u16(&p->bits)),
                      high = vreinterpretq_f16_u16(vld1q_u16(&p[8].bits));
    return {vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low),
            vcvt_f32_f16(vget_low_f16(high)), vcvt_high_f32_f16(high)};
  }
  void store(float* p) const {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v[i]);
  }
  void add_to(double* p) const {
    for (int i = 0; i < 4; ++i, p += 4) {
      vst1q_f64(p, vaddq_f64(vld1q_f64(p), vcvt_f64_f32(vget_low_f32(v[i]))));
      vst1q_f64(p + 2, vaddq_f64(vld1q_f64(p + 2), vcvt_high_f64_f32(v[i])));
    }
  }
  static F32 rounded(const double* p) {
    return each<F32>([=](int i) {
      return vcvt_high_f32_f64(vcvt_f32_f64(vld1q_f64(p + 4 * i)), vld1q_f64(p + 4 * i + 2));
    });
  }
};

inline F32 mul(F32 a, F32 b) {
  return each<F32>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline F32 fma(F32 a, F32 b, F32 c) {
  return each<F32>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
inline F32 add(F32 a, F32 b) {
  return each<F32>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline F32 sub(F32 a, F32 b) {
  return each<F32>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline F32 div(F32 a, F32 b) {
  return each<F32>([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline F32 clamp(F32 x, float limit) {
  const float32x4_t most = vdupq_n_f32(limit), least = vdupq_n_f32(-limit);
  return each<F32>([&](int i) { return vminq_f32(vmaxq_f32(x.v[i], least), most); });
}
inline F32 exponent_of(F32 x) {
  return each<F32>(
      [&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(x.v[i]), 23)); });
}

struct F64 : Parts<float64x2_t> {
  using Parts::Parts;
  using Scalar = double;
  static constexpr int64_t kLanes = 8;

  static F64 zero() { return broadcast(0); }
  static F64 broadcast(double x) {
    return each<F64>([=](int) { return vdupq_n_f64(x); });
  }
  static F64 load(const double* p) {
    return each<F64>([=](int i) { return vld1q_f64(p + 2 * i); });
  }
  void store(double* p) const {
    for (int i = 0; i < 4; ++i) vst1q_f64(p + 2 * i, v[i]);
  }
  void add_to(double* p) const {
    for (int i = 0; i < 4; ++i) vst1q_f64(p + 2 * i, vaddq_f64(vld1q_f64(p + 2 * i), v[i]));
  }
  static F64 rounded(const double* p) { return load(p); }
};

inline F64 mul(F64 a, F64 b) {
  return each<F64>([&](int i) { return vmulq_f64(a.v[i], b.v[i]); });
}
inline F64 fma(F64 a, F64 b, F64 c) {
  return each<F64>([&](int i) { return vfmaq_f64(c.v[i], a.v[i], b.v[i]); });
}
inline F64 add(F64 a, F64 b) {
  return each<F64>([&](int i) { return vaddq_f64(a.v[i], b.v[i]); });
}
inline F64 sub(F64 a, F64 b) {
  return each<F64>([&](int i) { return vsubq_f64(a.v[i], b.v[i]); });
}
inline F64 div(F64 a, F64 b) {
  return each<F64>([&](int i) { return vdivq_f64(a.v[i], b.v[i]); });
}
inline F64 clamp(F64 x, double limit) {
  const float64x2_t most = vdupq_n_f64(limit), least = vdupq_n_f64(-limit);
  return each<F64>([&](int i) { return vminq_f64(vmaxq_f64(x.v[i], least), most); });
}
inline F64 exponent_of(F64 x) {
  return each<F64>(
      [&](int i) { return vreinterpretq_f64_u64(vshlq_n_u64(vreinterpretq_u64_f64(x.v[i]), 52)); });
}

inline float32x4_t sum_of_parts(F32 x) {
  return vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3]));
}
inline float64x2_t sum_of_parts(F64 x) {
  return vaddq_f64(vaddq_f64(x.v[0], x.v[1]), vaddq_f64(x.v[2], x.v[3]));
}

inline void add_sums(const F32* v, double* p) {
  const float32x4_t low = vpaddq_f32(sum_of_parts(v[0]), sum_of_parts(v[1]));
  const float32x4_t high = vpaddq_f32(sum_of_parts(v[2]), sum_of_parts(v[3]));
  const float32x4_t sums = vpaddq_f32(low, high);
  vst1q_f64(p, vaddq_f64(vld1q_f64(p), vcvt_f64_f32(vget_low_f32(sums))));
  vst1q_f64(p + 2, vaddq_f64(vld1q_f64(p + 2), vcvt_high_f64_f32(sums)));
}

inline void add_sums(const F64* v, double* p) {
  for (int i = 0; i < 4; i += 2) {
    const float64x2_t sums = vpaddq_f64(sum_of_parts(v[i]), sum_of_parts(v[i + 1]));
    vst1q_f64(p + i, vaddq_f64(vld1q_f64(p + i), sums));
  }
}

// A vector's elements, rounded to nearest even.
inline void store_elements(F32 x, float* p) { x.store(p); }
inline void store_elements(F64 x, double* p) { x.store(p); }
inline void store_elements(F32 x, Fp16* p) {
  for (int i = 0; i < 4; i += 2) {
    const float16x8_t half = vcvt_high_f16_f32(vcvt_f16_f32(x.v[i]), x.v[i + 1]);
    vst1q_u16(&p[4 * i].bits, vreinterpretq_u16_f16(half));
  }
}
inline void store_elements(F32 x, Bf16* p) {
  const uint32x4_t one = vdupq_n_u32(1), below_half = vdupq_n_u32(0x7fff);
  uint32x4_t bits[4], bias[4];
  for (int i = 0; i < 4; ++i) {
    bits[i] = vreinterpretq_u32_f32(x.v[i]);
    bias[i] = vaddq_u32(vandq_u32(vshrq_n_u32(bits[i], 16), one), below_half);
  }
  for (int i = 0; i < 4; i += 2) {
    const uint16x4_t low = vaddhn_u32(bits[i], bias[i]);
    vst1q_u16(&p[4 * i].bits, vaddhn_high_u32(low, bits[i + 1], bias[i + 1]));
  }
}

// Lines lie in the order of the elements. There is no store past the caches: the hint that the
// instruction set has for one (stnp) is out of reach of gcc's intrinsics.
template <class T, class V>
inline void store_line(T* p, const V* v, bool) {
  for (int64_t i = 0; i < 64 / static_cast<int64_t>(sizeof(T)) / V::kLanes; ++i)
    store_elements(v[i], p + i * V::kLanes);
}

template <class T, class V>
inline void load_line(const T* p, V* v) {
  for (int64_t i = 0; i < 64 / static_cast<int64_t>(sizeof(T)) / V::kLanes; ++i)
    v[i] = V::load(p + i * V::kLanes);
}

// Doubles += a line.
template <class T, class V>
inline void add_line(double* p, const V* v) {
  for (int64_t i = 0; i < 64 / static_cast<int64_t>(sizeof(T)) / V::kLanes; ++i)
    v[i].add_to(p + i * V::kLanes);
}

// A line out of doubles.
template <class T, class V>
inline void round_line(const double* p, V* v) {
  for (int64_t i = 0; i < 64 / static_cast<int64_t>(sizeof(T)) / V::kLanes; ++i)
    v[i] = V::rounded(p + i * V::kLanes);
}

inline void store_fence() {}
// Into the second-level cache.
inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }
// Into the first-level cache.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace
}  // namespace elva

#endif  // ELVA_CPU_SIMD_NEON_H_
