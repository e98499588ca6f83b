// Sums in lanes and a tree. Of internal linkage, as all that *_simd.cpp include: see simd.h.
#ifndef ELVA_CPU_LANE_SUMS_H_
#define ELVA_CPU_LANE_SUMS_H_

#include <stdint.h>

namespace elva {
namespace {

// The sum over i of term(i): its order is the same on every level.
template <class Term>
inline double sum_of(int64_t count, const Term& term) {
  constexpr int64_t kLanes = 8;
  double lanes[kLanes] = {};
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += term(i + l);
  }
  for (int64_t i = whole; i < count; ++i) lanes[i - whole] += term(i);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

}  // namespace
}  // namespace elva
#endif  // ELVA_CPU_LANE_SUMS_H_
