// What the dot products of every op share: how a level steps through rows of an element type, and
// the zeros after a row's end. Internal linkage, as in simd.h.
#ifndef ELVA_CPU_SIMD_DOTS_H_
#define ELVA_CPU_SIMD_DOTS_H_

#include <type_traits>

#include "simd.h"

namespace elva {
namespace {

// Elements in 64 bytes.
template <class T>
constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));

template <class T>
using VectorFor = std::conditional_t<std::is_same_v<T, double>, F64, F32>;

// The first `count` elements at p and zeros.
template <class T>
struct PaddedLine {
  alignas(64) T elements[kLine<T>] = {};
  PaddedLine(const T* p, int64_t count) {
    memcpy(elements, p, static_cast<size_t>(count) * sizeof(T));
  }
};

// One vector a step.
template <class T>
struct PlainDots {
  using V = VectorFor<T>;
  static constexpr int64_t kStep = V::kLanes;
  using Element = V;
  static Element load(const T* p) { return V::load(p); }
  static Element load(const T* p, int64_t count) { return load(PaddedLine<T>(p, count).elements); }
  static V accumulate(V sum, Element a, Element b) { return fma(a, b, sum); }
};

#if ELVA_BF16_INSTRUCTIONS
// Two products a lane and step: exact, and added one after the other.
struct PairedDots {
  using V = F32;
  static constexpr int64_t kStep = 32;
  using Element = __m512bh;
  static Element load(const Bf16* p) {
    Element x;
    memcpy(&x, p, sizeof(x));
    return x;
  }
  static Element load(const Bf16* p, int64_t count) {
    return load(PaddedLine<Bf16>(p, count).elements);
  }
  static V accumulate(V sum, Element a, Element b) { return {_mm512_dpbf16_ps(sum.v, a, b)}; }
};
template <class T>
using DotsFor = std::conditional_t<std::is_same_v<T, Bf16>, PairedDots, PlainDots<T>>;
#else
template <class T>
using DotsFor = PlainDots<T>;
#endif

}  // namespace
}  // namespace elva

#endif  // ELVA_CPU_SIMD_DOTS_H_
