// Vectors of 16 float and 8 double in standard C++, for any processor. Products are rounded before
// they are added, since a correctly rounded fma is a library call where the processor has none. See
// simd.h.
#ifndef ELVA_CPU_SIMD_PLAIN_H_
#define ELVA_CPU_SIMD_PLAIN_H_

namespace elva {
namespace {

template <class Scalar_, int64_t kLanes_>
struct Vector {
  using Scalar = Scalar_;
  static constexpr int64_t kLanes = kLanes_;
  Scalar v[kLanes];

  static Vector zero() { return broadcast(0); }
  static Vector broadcast(Scalar x) {
    Vector out;
    for (Scalar& lane : out.v) lane = x;
    return out;
  }
  template <class T>
  static Vector load(const T* p) {
    Vector out;
    for (int64_t i = 0; i < kLanes; ++i) out.v[i] = widened(p[i]);
    return out;
  }
  void store(Scalar* p) const { memcpy(p, v, sizeof(v)); }
  void add_to(double* p) const {
    for (int64_t i = 0; i < kLanes; ++i) p[i] += static_cast<double>(v[i]);
  }
  static Vector rounded(const double* p) {
    Vector out;
    for (int64_t i = 0; i < kLanes; ++i) out.v[i] = static_cast<Scalar>(p[i]);
    return out;
  }

 private:
  static double widened(double x) { return x; }
  template <class T>
  static float widened(T x) {
    return to_float(x);
  }
};

using F32 = Vector<float, 16>;
using F64 = Vector<double, 8>;

template <class V>
inline V mul(V a, V b) {
  for (int64_t i = 0; i < V::kLanes; ++i) a.v[i] *= b.v[i];
  return a;
}

template <class V>
inline V fma(V a, V b, V c) {
  for (int64_t i = 0; i < V::kLanes; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}

template <class V>
inline V add(V a, V b) {
  for (int64_t i = 0; i < V::kLanes; ++i) a.v[i] += b.v[i];
  return a;
}

template <class V>
inline V sub(V a, V b) {
  for (int64_t i = 0; i < V::kLanes; ++i) a.v[i] -= b.v[i];
  return a;
}

template <class V>
inline V div(V a, V b) {
  for (int64_t i = 0; i < V::kLanes; ++i) a.v[i] /= b.v[i];
  return a;
}

template <class V>
inline V clamp(V x, typename V::Scalar limit) {
  for (auto& lane : x.v) lane = lane > limit ? limit : lane < -limit ? -limit : lane;
  return x;
}

template <class V>
inline V exponent_of(V x) {
  using Bits = std::conditional_t<sizeof(typename V::Scalar) == 8, uint64_t, uint32_t>;
  for (auto& lane : x.v) {
    Bits bits;
    memcpy(&bits, &lane, sizeof(bits));
    bits <<= std::numeric_limits<typename V::Scalar>::digits - 1;
    memcpy(&lane, &bits, sizeof(bits));
  }
  return x;
}

template <class V>
inline void add_sums(const V* v, double* p) {
  for (int r = 0; r < 4; ++r) {
    V lanes = v[r];
    for (int64_t width = V::kLanes / 2; width > 0; width /= 2) {
      for (int64_t i = 0; i < width; ++i) lanes.v[i] += lanes.v[i + width];
    }
    p[r] += static_cast<double>(lanes.v[0]);
  }
}

template <class T, class V>
inline void store_line(T* p, const V* v, bool) {
  for (int64_t i = 0; i < static_cast<int64_t>(64 / sizeof(T)); ++i) {
    const typename V::Scalar x = v[i / V::kLanes].v[i % V::kLanes];
    if constexpr (sizeof(T) == 2) {
      from_float(x, p + i);
    } else {
      p[i] = x;
    }
  }
}

template <class T, class V>
inline void load_line(const T* p, V* v) {
  for (int64_t i = 0; i < 64 / static_cast<int64_t>(sizeof(T)) / V::kLanes; ++i)
    v[i] = V::load(p + i * V::kLanes);
}

template <class T, class V>
inline void add_line(double* p, const V* v) {
  for (int64_t i = 0; i < 64 / static_cast<int64_t>(sizeof(T)) / V::kLanes; ++i)
    v[i].add_to(p + i * V::kLanes);
}

template <class T, class V>
inline void round_line(const double* p, V* v) {
  for (int64_t i = 0; i < 64 / static_cast<int64_t>(sizeof(T)) / V::kLanes; ++i)
    v[i] = V::rounded(p + i * V::kLanes);
}

inline void store_fence() {}
inline void prefetch(const void*) {}
inline void prefetch_far(const void*) {}

}  // namespace
}  // namespace elva

#endif  // ELVA_CPU_SIMD_PLAIN_H_
