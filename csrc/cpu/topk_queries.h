// The queries of a search as the inner loop reads them, and their scores from its dots.
#ifndef ELVA_CPU_TOPK_QUERIES_H_
#define ELVA_CPU_TOPK_QUERIES_H_

#include <math.h>

#include <algorithm>
#include <limits>

#include "kernels.h"
#include "rescale.h"

namespace elva {

template <class T>
class Queries {
 public:
  using V = typename ValueOf<T>::Type;

  static int64_t padded_dim(int64_t dim) { return (dim + kPadding - 1) / kPadding * kPadding; }
  static size_t bytes(int64_t count, int64_t dim) {
    return Arena::bytes_for<T>(count * padded_dim(dim)) + Arena::bytes_for<const void*>(count) +
           Arena::bytes_for<double>(count) + Arena::bytes_for<int>(count) +
           Arena::bytes_for<bool>(count);
  }

  // Rows [first, first + count) of args.query. Throws std::bad_alloc.
  Queries(const ElvaTopkArgs& args, int64_t first, int64_t count)
      : cosine_(args.metric == ELVA_COSINE), count_(count) {
    const int64_t padded = padded_dim(args.dim);
    memory_.reset(bytes(count, args.dim));
    T* packed = memory_.take<T>(count * padded);
    pointers_ = memory_.take<const void*>(count);
    norms_ = memory_.take<double>(count);
    exponents_ = memory_.take<int>(count);
    finite_ = memory_.take<bool>(count);
    const T* data = static_cast<const T*>(args.query.data) + first * args.query.row_stride;
    for (int64_t q = 0; q < count; ++q) {
      T* out = packed + q * padded;
      pointers_[q] = out;
      std::fill(out + args.dim, out + padded, T{});
      set(q, {data + q * args.query.row_stride, args.query.stride}, args.dim, out);
    }
  }

  int64_t count() const { return count_; }
  const void* const* pointers(int64_t q) const { return pointers_ + q; }
  bool cosine() const { return cosine_; }
  bool finite(int64_t q) const { return finite_[q]; }

  // Of a row 2^-exponent times the corpus's, with that norm; `dot` with the packed query.
  V score(int64_t q, double dot, double norm, int exponent) const {
    double score;
    if (cosine_) {
      score = std::min(1.0, std::max(-1.0, score_of<T>(dot, norms_[q], norm)));
    } else {
      score = std::ldexp(dot, exponents_[q] + exponent);
    }
    return static_cast<V>(score) + V{0};  // -0 becomes 0
  }

  // Rows of exponent 0 whose dot / norm (dot where the metric is) is lower do not score
  // `threshold`. By less than the rounding of the score, so that almost no other row passes.
  double least(int64_t q, V threshold) const {
    constexpr V kInfinity = std::numeric_limits<V>::infinity();
    if (threshold == -kInfinity) return -std::numeric_limits<double>::infinity();
    const double below = static_cast<double>(std::nextafter(threshold, -kInfinity));
    if (!cosine_) return std::ldexp(below, -exponents_[q]);
    if (below <= -1) return -std::numeric_limits<double>::infinity();      // clamped
    if (threshold == 0) return -2 * Range<T>::kSmallestScore * norms_[q];  // flushed
    return (below - std::fabs(below) * 1e-14) * norms_[q];
  }

 private:
  void set(int64_t q, Row<T> row, int64_t dim, T* out) {
    double square = 0;
    for (int64_t i = 0; i < dim; ++i) square += to_double(row[i]) * to_double(row[i]);
    finite_[q] = true;
    exponents_[q] = 0;
    if (in_range<T>(square)) {
      pack(row, dim, out);
      norms_[q] = std::sqrt(square);
      return;
    }
    const RowKind kind = inspect(row, dim, &exponents_[q]);
    finite_[q] = kind != RowKind::kNotFinite;
    norms_[q] = 1;  // of a zero query: its dots are 0, and so its scores
    if (kind != RowKind::kFinite) {
      std::fill(out, out + dim, T{});
      return;
    }
    pack_scaled(row, dim, exponents_[q], out);
    square = 0;
    const PowerOfTwo scale(-exponents_[q]);
    for (int64_t i = 0; i < dim; ++i) {
      const double x = scale(to_double(row[i]));
      square += x * x;
    }
    norms_[q] = std::sqrt(square);
  }

  const bool cosine_;
  const int64_t count_;
  Arena memory_;
  const void** pointers_;
  double* norms_;
  int* exponents_;
  bool* finite_;
};

}  // namespace elva
#endif  // ELVA_CPU_TOPK_QUERIES_H_
