// One group of the grouped reward on one thread: scores, ranks, coefficients, gradient rows.
//
// Coefficients, per group, a[C], b[C] and the query's b, C = negatives + 1, for an upstream
// gradient of 1:
//   gradient row i = 2^-e (a q' + b c'), c' = c 2^-e; a = b = 0: a row of zeros
//   gradient of the query = 2^-f (sum of a c' + b q'), q' = q 2^-f
// They follow from ds/dc = (q^ - s c^) / |c| and ds/dq = (c^ - s q^) / |q|. A row in the range of
// rescale.h has e = 0; one that is not has the lowest bit of its a set (the query: of its b), and e
// is found again from the row.
#ifndef ELVA_CPU_REWARD_GROUP_H_
#define ELVA_CPU_REWARD_GROUP_H_

#include <string.h>

#include "arena.h"
#include "kernels.h"
#include "ranking.h"
#include "rescale.h"
#include "row_layout.h"

namespace elva {

template <class T>
class RewardGroup {
 public:
  using V = typename ValueOf<T>::Type;

  static size_t arena_bytes(int64_t candidates, int64_t dim) {
    const int64_t c = candidates + 1;
    return Arena::bytes_for<T>(dim) * (kBlock + 1) + Arena::bytes_for<double>(dim + kPadding) +
           Arena::bytes_for<uint32_t>(c) + Arena::bytes_for<double>(c) * 5 +
           Arena::bytes_for<bool>(c) + RankBuffers<V>::arena_bytes(c) + Arena::bytes_for<V>(c) +
           Arena::bytes_for<V>(2 * c) + Arena::bytes_for<double>(2 * c);
  }

  RewardGroup(const Kernels& kernels, ElvaDtype dtype, int64_t candidates, int64_t dim,
              Arena* arena)
      : kernels_(kernels),
        dtype_(dtype),
        candidates_(candidates),
        dim_(dim),
        ranking_(candidates + 1, arena) {
    packed_query_ = arena->take<T>(dim);
    for (T*& block : packed_) block = arena->take<T>(dim);
    query_sum_ = arena->take<double>(dim + kPadding);
    const int64_t c = candidates + 1;
    live_ = arena->take<uint32_t>(c);
    dot_ = arena->take<double>(c);
    norm_ = arena->take<double>(c);
    score_ = arena->take<double>(c);
    rows_ = arena->take<const void*>(c);
    outs_ = arena->take<void*>(c);
    live_scores_ = arena->take<V>(c);
    fast_coefficients_ = arena->take<V>(2 * c);
    rescaled_ = arena->take<bool>(c);
    own_coefficients_ = arena->take<double>(2 * c);
  }

  // The group's rows. Masked ones are never read.
  void bind(Row<T> query, Row<T> positive, Row<T> negatives, int64_t negative_stride) {
    query_row_ = query;
    positive_ = positive;
    negatives_ = negatives;
    negative_stride_ = negative_stride;
    dense_ = dim_ <= 1 || (positive.stride == 1 && negatives.stride == 1);
  }

  // Memory that the thread reads after this group's gradients; bytes may be 0.
  void set_ahead(const T* start, int64_t count) {
    ahead_ = start;
    ahead_lines_ = count * static_cast<int64_t>(sizeof(T)) / 64;
  }

  void set_mask(const bool* mask, int64_t stride) {
    live_count_ = 0;
    live_[live_count_++] = 0;
    for (int64_t i = 1; i < candidates_; ++i) {
      if (mask == nullptr || mask[(i - 1) * stride])
        live_[live_count_++] = static_cast<uint32_t>(i);
    }
  }

  // [2 * candidates + 1], for a caller that keeps none.
  double* own_coefficients() { return own_coefficients_; }

  // Eq. (1): scores [candidates].
  void score(V* scores) {
    std::fill(scores, scores + candidates_, -std::numeric_limits<V>::infinity());
    const RowKind query_kind = open_query();
    const int64_t step = dense_ ? live_count_ : kBlock;
    for (int64_t start = 0; start < live_count_; start += step) {
      const int64_t count = std::min(step, live_count_ - start);
      gather(live_ + start, count);
      kernels_.dots[dtype_]({query_, rows_, count, dim_, dot_ + start, norm_ + start});
    }
    for (int64_t j = 0; j < live_count_; ++j) {
      const RowKind kind = close_row(j);
      if (kind == RowKind::kNotFinite || query_kind == RowKind::kNotFinite) {
        score_[j] = std::numeric_limits<double>::quiet_NaN();
      } else if (kind == RowKind::kZero || query_kind == RowKind::kZero) {
        score_[j] = norm_[j] = 0;
      } else {
        score_[j] = score_of<T>(dot_[j], query_norm_, norm_[j]);
      }
      const double clamped = score_[j] > 1 ? 1.0 : score_[j] < -1 ? -1.0 : score_[j];
      live_scores_[j] = static_cast<V>(clamped);
      scores[live_[j]] = live_scores_[j];
    }
  }

  // Eq. (2) to (6) on the scores.
  GroupReward rank(const ElvaRewardWeights& weights) {
    return reward_of<V>(kernels_, live_scores_, live_count_, weights, ranking_);
  }

  // After rank() with the same weights.
  void set_coefficients(const ElvaRewardWeights& weights, double* coefficients) {
    add_soft_slopes<V>(kernels_, live_scores_, live_count_, weights, ranking_);
    double* a = coefficients;
    double* b = coefficients + candidates_;
    std::fill(coefficients, coefficients + 2 * candidates_, 0.0);
    double query_b = 0;
    for (int64_t j = 0; j < live_count_; ++j) {
      const double slope = ranking_.slopes[j], product = query_norm_ * norm_[j];
      if (std::isnan(slope)) {
        a[live_[j]] = b[live_[j]] = query_b = slope;
      } else if (product != 0) {  // a zero row has gradient 0 and gives none
        a[live_[j]] = marked(slope / product, rescaled_[j]);
        b[live_[j]] = -slope * score_[j] / (norm_[j] * norm_[j]);
        query_b -= slope * score_[j];
      }
    }
    const bool divides = query_norm_ > 0 && !std::isnan(query_b);
    coefficients[2 * candidates_] =
        marked(divides ? query_b / (query_norm_ * query_norm_) : query_b, query_exponent_ != 0);
  }

  // Gradient rows from coefficients; reads the rows again. query_is_open: score() ran on this group
  // just before.
  void gradients(const double* coefficients, double upstream, bool query_is_open, bool stream,
                 T* grad_query, T* grad_positive, T* grad_negatives) {
    const double* a = coefficients;
    const double* b = coefficients + candidates_;
    const double query_b = coefficients[2 * candidates_];
    if (!query_is_open) reopen_query(is_marked(query_b) ? exponent_of(query_row_, dim_) : 0);
    std::fill(query_sum_, query_sum_ + dim_ + kPadding, 0.0);
    V* fast_a = fast_coefficients_;
    V* fast_b = fast_coefficients_ + candidates_;
    int64_t fast = 0;
    for (int64_t i = 0; i < candidates_; ++i) {
      T* out = i == 0 ? grad_positive : grad_negatives + (i - 1) * dim_;
      if (a[i] == 0 && b[i] == 0) {
        memset(out, 0, static_cast<size_t>(dim_) * sizeof(T));
        continue;
      }
      const double row_a = upstream * a[i], row_b = upstream * b[i];
      if (is_marked(a[i]) || !moderate(row_a) || !moderate(row_b)) {
        careful_gradient(row(i), row_a, row_b, is_marked(a[i]) ? exponent_of(row(i), dim_) : 0,
                         out);
        continue;
      }
      fast_a[fast] = static_cast<V>(row_a);
      fast_b[fast] = static_cast<V>(row_b);
      live_[fast] = static_cast<uint32_t>(i);
      outs_[fast++] = out;
    }
    const int64_t step = dense_ ? fast : kBlock;
    for (int64_t start = 0; start < fast; start += step) {
      const int64_t count = std::min(step, fast - start);
      gather(live_ + start, count);
      kernels_.gradients[dtype_]({query_, rows_, outs_ + start, fast_a + start, fast_b + start,
                                  count, dim_, query_sum_, stream, ahead_, ahead_lines_});
      ahead_lines_ = 0;
    }
    close_query_gradient(upstream * query_b, grad_query);
  }

 private:
  static constexpr int64_t kBlock = 8;

  // Where the fast path neither overflows nor meets NaN.
  static bool moderate(double x) { return std::fabs(x) < 0x1p60; }

  static double marked(double x, bool mark) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof(bits));
    bits = (bits & ~uint64_t{1}) | (mark ? 1 : 0);
    memcpy(&x, &bits, sizeof(bits));
    return x;
  }

  static bool is_marked(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return (bits & 1) != 0;
  }

  Row<T> row(int64_t candidate) const {
    if (candidate == 0) return positive_;
    return {negatives_.data + (candidate - 1) * negative_stride_, negatives_.stride};
  }

  // rows_[0..count) = dense copies of the candidates, or themselves.
  void gather(const uint32_t* candidates, int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
      const Row<T> source = row(candidates[k]);
      if (dense_) {
        rows_[k] = source.data;
      } else {
        pack(source, dim_, packed_[k]);
        rows_[k] = packed_[k];
      }
    }
  }

  // Makes query_ dense and in range, and sets its norm there.
  RowKind open_query() {
    reopen_query(0);
    double dot, square;
    const void* self = query_;
    kernels_.dots[dtype_]({query_, &self, 1, dim_, &dot, &square});
    RowKind kind = RowKind::kFinite;
    if (!in_range<T>(square)) {
      int exponent;
      kind = inspect(query_row_, dim_, &exponent);
      if (kind == RowKind::kFinite) {
        reopen_query(exponent);
        self = query_;
        kernels_.dots[dtype_]({query_, &self, 1, dim_, &dot, &square});
      }
    }
    query_norm_ = kind == RowKind::kZero ? 0 : std::sqrt(square);
    return kind;
  }

  void reopen_query(int exponent) {
    query_exponent_ = exponent;
    query_ = packed_query_;
    if (exponent != 0) {
      pack_scaled(query_row_, dim_, exponent, packed_query_);
    } else if (dim_ > 1 && query_row_.stride != 1) {
      pack(query_row_, dim_, packed_query_);
    } else {
      query_ = query_row_.data;
    }
  }

  // Turns norm_[j] from the square into the norm; where the row is out of range, both products anew
  // from a scaled copy.
  RowKind close_row(int64_t j) {
    rescaled_[j] = false;
    RowKind kind = RowKind::kFinite;
    if (!in_range<T>(norm_[j])) {
      const Row<T> source = row(live_[j]);
      int exponent;
      kind = inspect(source, dim_, &exponent);
      if (kind == RowKind::kFinite) {
        rescaled_[j] = exponent != 0;
        pack_scaled(source, dim_, exponent, packed_[0]);
        const void* scaled = packed_[0];
        kernels_.dots[dtype_]({query_, &scaled, 1, dim_, dot_ + j, norm_ + j});
      }
    }
    norm_[j] = std::sqrt(norm_[j]);
    return kind;
  }

  static int exponent_of(Row<T> source, int64_t dim) {
    int exponent;
    inspect(source, dim, &exponent);
    return exponent;
  }

  // One gradient row in double, for rows and coefficients of any magnitude, NaN included.
  void careful_gradient(Row<T> source, double a, double b, int exponent, T* out) {
    const PowerOfTwo scale(-exponent);
    for (int64_t i = 0; i < dim_; ++i) {
      const double c = scale(to_double(source[i]));
      from_double(scale(a * to_double(query_[i]) + b * c), out + i);
      query_sum_[i] += a * c;
    }
  }

  void close_query_gradient(double b, T* out) {
    if (query_exponent_ == 0 && moderate(b)) {
      kernels_.query_gradient[dtype_]({query_, query_sum_, b, dim_, out});
      return;
    }
    const PowerOfTwo scale(-query_exponent_);
    for (int64_t i = 0; i < dim_; ++i)
      from_double(scale(query_sum_[i] + b * to_double(query_[i])), out + i);
  }

  const Kernels& kernels_;
  const ElvaDtype dtype_;
  const int64_t candidates_, dim_;
  Row<T> query_row_{}, positive_{}, negatives_{};
  int64_t negative_stride_ = 0;
  bool dense_ = true;
  const T* ahead_ = nullptr;
  int64_t ahead_lines_ = 0;
  int64_t live_count_ = 0;
  double query_norm_ = 0;
  int query_exponent_ = 0;
  const T* query_ = nullptr;  // dense, in range
  T* packed_query_;
  T* packed_[kBlock];
  double* query_sum_;
  uint32_t* live_;
  RankBuffers<V> ranking_;
  double *dot_, *norm_, *score_;
  const void** rows_;
  void** outs_;
  bool* rescaled_;
  V* live_scores_;
  V* fast_coefficients_;
  double* own_coefficients_;
};

}  // namespace elva
#endif  // ELVA_CPU_REWARD_GROUP_H_
