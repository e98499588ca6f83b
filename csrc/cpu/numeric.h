// The element types of a call and their scalar conversions, for what is off the fast path. The
// functions are static: an inline one that a CPU level compiled with its own instructions could be
// the copy the linker keeps for all.
#ifndef ELVA_CPU_NUMERIC_H_
#define ELVA_CPU_NUMERIC_H_

#include <stdint.h>
#include <string.h>

#include "../elva.h"

namespace elva {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// `function` with an element of the type that `dtype` names: where a call's type is decided.
template <class Function>
static inline ElvaStatus by_dtype(ElvaDtype dtype, const Function& function) {
  switch (dtype) {
    case ELVA_BF16:
      return function(Bf16());
    case ELVA_FP16:
      return function(Fp16());
    case ELVA_FP32:
      return function(float());
    case ELVA_FP64:
      return function(double());
  }
  return ELVA_UNSUPPORTED;
}

// The same of values, which are float or double.
template <class Function>
static inline ElvaStatus by_value_dtype(ElvaDtype dtype, const Function& function) {
  if (dtype == ELVA_FP32) return function(float());
  return dtype == ELVA_FP64 ? function(double()) : ELVA_UNSUPPORTED;
}

// What scores and rewards of an element type are computed to.
template <class T>
struct ValueOf {
  using Type = float;
};
template <>
struct ValueOf<double> {
  using Type = double;
};

static inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

static inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

static inline float to_float(float x) { return x; }
static inline float to_float(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
static inline float to_float(Fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return float_of(sign | bits_of(subnormal));
}

static inline double to_double(double x) { return x; }
template <class T>
static inline double to_double(T x) {
  return static_cast<double>(to_float(x));
}

// Round to nearest even; NaN stays NaN.
static inline void from_float(float x, float* out) { *out = x; }
static inline void from_float(float x, Bf16* out) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = 0x7fc0;
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
}
static inline void from_float(float x, Fp16* out) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u;
  const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {  // 65536 and above, infinity included
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal; a carry out of 65504 gives infinity
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded by the
            // addition
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// One rounding from double: to float by rounding to odd, which a second rounding to 11 bits or
// fewer cannot notice.
static inline void from_double(double x, double* out) { *out = x; }
static inline void from_double(double x, float* out) { *out = static_cast<float>(x); }
template <class T>
static inline void from_double(double x, T* out) {
  float nearest = static_cast<float>(x);
  if (nearest == nearest && static_cast<double>(nearest) != x) {
    uint32_t bits = bits_of(nearest);
    const double magnitude = x < 0 ? -x : x;
    if (static_cast<double>(float_of(bits & 0x7fffffffu)) > magnitude) bits -= 1;
    nearest = float_of(bits | 1u);
  }
  from_float(nearest, out);
}

}  // namespace elva
#endif  // ELVA_CPU_NUMERIC_H_
