// Rows whose squared norm does not fit the fast path: found, classified and scaled by an exact
// power of two.
//
// The range keeps every product and sum of the fast path clear of overflow, and what underflow
// there is at least 2^70 times below a score that is not flushed (score_of). A power of two
// commutes with every rounding otherwise, so a row scores the same bits whether it was scaled here,
// by the caller, or not at all.
#ifndef ELVA_CPU_RESCALE_H_
#define ELVA_CPU_RESCALE_H_

#include <math.h>

#include "numeric.h"
#include "row_layout.h"

namespace elva {

template <class T>
struct Range {
  static constexpr double kLowSquare = 0x1p-20, kHighSquare = 0x1p60, kSmallestScore = 0x1p-50;
};
// fp16's own range is narrow enough: its smallest product is 2^-48, and no sum overflows.
template <>
struct Range<Fp16> {
  static constexpr double kLowSquare = 0x1p-48, kHighSquare = 0x1p100, kSmallestScore = 0x1p-50;
};
template <>
struct Range<double> {
  static constexpr double kLowSquare = 0x1p-200, kHighSquare = 0x1p400, kSmallestScore = 0x1p-300;
};

// NaN is out of range.
template <class T>
bool in_range(double square) {
  return square >= Range<T>::kLowSquare && square <= Range<T>::kHighSquare;
}

// The cosine before clamping. Below kSmallestScore it is 0: there, underflow in the row's products
// would show.
template <class T>
double score_of(double dot, double query_norm, double norm) {
  const double score = dot / (query_norm * norm);
  return std::fabs(score) < Range<T>::kSmallestScore ? 0.0 : score;
}

// x * 2^exponent where the power itself may lie outside the range of double.
class PowerOfTwo {
 public:
  explicit PowerOfTwo(int exponent)
      : first_(std::ldexp(1.0, exponent / 2)), second_(std::ldexp(1.0, exponent - exponent / 2)) {}
  double operator()(double x) const { return x * first_ * second_; }

 private:
  double first_, second_;
};

template <class T>
void pack(Row<T> row, int64_t dim, T* out) {
  for (int64_t i = 0; i < dim; ++i) out[i] = row[i];
}

// row * 2^-exponent.
template <class T>
void pack_scaled(Row<T> row, int64_t dim, int exponent, T* out) {
  const PowerOfTwo scale(-exponent);
  for (int64_t i = 0; i < dim; ++i) from_double(scale(to_double(row[i])), out + i);
}

enum class RowKind { kFinite, kZero, kNotFinite };

// What a row is; *exponent is that of its largest magnitude.
template <class T>
RowKind inspect(Row<T> row, int64_t dim, int* exponent) {
  double largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < dim; ++i) {
    const double magnitude = std::fabs(to_double(row[i]));
    finite = finite && std::isfinite(magnitude);
    largest = magnitude > largest ? magnitude : largest;
  }
  *exponent = 0;
  if (!finite) return RowKind::kNotFinite;
  if (largest == 0) return RowKind::kZero;
  *exponent = std::ilogb(largest);
  return RowKind::kFinite;
}

// The exponent that a row out of range is scaled by.
template <class T>
int scale_exponent(Row<T> row, int64_t dim) {
  int exponent;
  inspect(row, dim, &exponent);
  return exponent;
}

}  // namespace elva
#endif  // ELVA_CPU_RESCALE_H_
