// One group of the grouped reward on one thread: scores, ranks, coefficients, gradient rows.
#ifndef ELVA_CPU_REWARD_GROUP_H_
#define ELVA_CPU_REWARD_GROUP_H_

#include <string.h>

#include <algorithm>

#include "arena.h"
#include "coefficients.h"
#include "kernels.h"
#include "ranking.h"
#include "rescale.h"
#include "row_layout.h"

namespace elva {

// Where a group's gradients go; null: not wanted.
template <class T>
struct GradientRowsOut {
  T* query;
  T* positive;
  T* negatives;
  bool stream;  // the negatives' past the caches
};

template <class T>
class RewardGroup {
 public:
  using V = typename ValueOf<T>::Type;

  static size_t arena_bytes(int64_t candidates, int64_t dim) {
    const int64_t c = candidates + 1;
    return Arena::bytes_for<T>(dim) * (kBlock + 3) + Arena::bytes_for<double>(dim + kPadding) +
           Arena::bytes_for<uint32_t>(c) + Arena::bytes_for<double>(c) * 3 +
           Arena::bytes_for<void*>(c + kDotAhead) * 3 + Arena::bytes_for<bool>(c) +
           RankBuffers<V>::arena_bytes(c) + Arena::bytes_for<V>(c) + Arena::bytes_for<V>(2 * c) +
           Arena::bytes_for<double>(2 * c);
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
    nan_row_ = arena->take<T>(dim);
    spare_row_ = arena->take<T>(dim);
    for (int64_t i = 0; i < dim; ++i) {
      from_double(std::numeric_limits<double>::quiet_NaN(), nan_row_ + i);
    }
    query_sum_ = arena->take<double>(dim + kPadding);
    const int64_t c = candidates + 1;
    live_ = arena->take<uint32_t>(c);
    dot_ = arena->take<double>(c);
    norm_ = arena->take<double>(c);
    score_ = arena->take<double>(c);
    rows_ = arena->take<const void*>(c + kDotAhead);
    ahead_ = arena->take<const void*>(c + kDotAhead);
    outs_ = arena->take<void*>(c + kDotAhead);
    live_scores_ = arena->take<V>(c);
    fast_coefficients_ = arena->take<V>(2 * c);
    rescaled_ = arena->take<bool>(c);
    own_coefficients_ = arena->take<double>(2 * c);
  }

  // The group's rows. Masked ones are never read.
  void bind(Row<T> query, Row<T> positive, const NegativeRows<T>& negatives) {
    query_row_ = query;
    positive_ = positive;
    negatives_ = negatives;
    dense_ = dim_ <= 1 || (positive.stride == 1 && negatives.stride == 1);
    ahead_count_ = 0;
  }

  // The rows of the thread's next group, which are asked for while this one computes.
  void look_ahead(const T* positive, const NegativeRows<T>& negatives) {
    if (!dense_) return;
    ahead_[ahead_count_++] = positive;
    for (int64_t i = 0; i + 1 < candidates_; ++i) {
      const T* row = negatives.row(i);
      if (row != nullptr) ahead_[ahead_count_++] = row;
    }
    const int64_t count = ahead_count_;
    while (ahead_count_ < candidates_ + kDotAhead) ahead_[ahead_count_++] = ahead_[count - 1];
  }

  void set_mask(const bool* mask, int64_t stride) {
    live_count_ = 0;
    live_[live_count_++] = 0;
    for (int64_t i = 1; i < candidates_; ++i) {
      const bool masked = mask != nullptr && !mask[(i - 1) * stride];
      if (!masked && !negatives_.is_hidden(i - 1)) {
        live_[live_count_++] = static_cast<uint32_t>(i);
      }
    }
  }

  // After set_mask(): [candidates - 1] of the negatives, or null.
  void set_relevance(const V* relevance) {
    relevance_ = live_relevance<V>(relevance, live_, live_count_, ranking_);
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

  // Eq. (2) to (6) on the scores, after set_relevance().
  GroupReward rank(const ElvaRewardWeights& weights) {
    return reward_of<V>(kernels_, live_scores_, live_count_, weights, relevance_, ranking_);
  }

  // After rank() with the same weights.
  void set_coefficients(const ElvaRewardWeights& weights, double* coefficients) {
    add_soft_slopes<V>(kernels_, live_scores_, live_count_, weights, relevance_, ranking_);
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
  void gradients(const double* coefficients, double upstream, bool query_is_open,
                 const GradientRowsOut<T>& outs) {
    const double* a = coefficients;
    const double* b = coefficients + candidates_;
    const double query_b = coefficients[2 * candidates_];
    if (!query_is_open) reopen_query(is_marked(query_b) ? scale_exponent(query_row_, dim_) : 0);
    std::fill(query_sum_, query_sum_ + dim_ + kPadding, 0.0);
    V* fast_a = fast_coefficients_;
    V* fast_b = fast_coefficients_ + candidates_;
    int64_t fast = 0;
    const int64_t read = outs.query == nullptr && outs.negatives == nullptr ? 1 : candidates_;
    for (int64_t i = 0; i < read; ++i) {
      T* out = outs.positive;
      if (i > 0) out = outs.negatives == nullptr ? nullptr : outs.negatives + (i - 1) * dim_;
      if (a[i] == 0 && b[i] == 0) {
        if (out != nullptr) memset(out, 0, static_cast<size_t>(dim_) * sizeof(T));
        continue;
      }
      const double row_a = upstream * a[i], row_b = upstream * b[i];
      if (is_marked(a[i]) || !moderate(row_a) || !moderate(row_b)) {
        careful_gradient(row(i), row_a, row_b, is_marked(a[i]) ? scale_exponent(row(i), dim_) : 0,
                         out);
        continue;
      }
      fast_a[fast] = static_cast<V>(row_a);
      fast_b[fast] = static_cast<V>(row_b);
      live_[fast] = static_cast<uint32_t>(i);
      outs_[fast++] = out == nullptr ? spare_row_ : out;
    }
    fast_gradients(fast, outs);
    if (outs.query != nullptr) close_query_gradient(upstream * query_b, outs.query);
  }

 private:
  static constexpr int64_t kBlock = 8;

  // The first `count` of live_, outs_ and fast_coefficients_.
  void fast_gradients(int64_t count, const GradientRowsOut<T>& outs) {
    double* sum = outs.query == nullptr ? nullptr : query_sum_;
    if (outs.negatives != nullptr) {
      run_gradients(count, outs_, sum, outs.stream);
    } else {
      if (sum != nullptr) run_gradients(count, nullptr, sum, false);
      if (outs.positive != nullptr && count > 0 && live_[0] == 0) {
        run_gradients(1, outs_, nullptr, false);
      }
    }
  }

  void run_gradients(int64_t fast, void* const* outs, double* sum, bool stream) {
    const int64_t step = dense_ ? fast : kBlock;
    for (int64_t start = 0; start < fast; start += step) {
      const int64_t count = std::min(step, fast - start);
      gather(live_ + start, count);
      kernels_.gradients[dtype_]({query_, rows_, outs == nullptr ? nullptr : outs + start,
                                  fast_coefficients_ + start,
                                  fast_coefficients_ + candidates_ + start, count, dim_, sum,
                                  stream, ahead_count_ > 0 ? ahead_ : nullptr});
    }
  }

  Row<T> row(int64_t candidate) const {
    if (candidate == 0) return positive_;
    const T* found = negatives_.row(candidate - 1);
    if (found == nullptr) return {nan_row_, 1};
    return {found, negatives_.stride};
  }

  // rows_[0..count) = dense copies of the candidates, or themselves; behind them what is read next.
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
    for (int64_t k = 0; k < kDotAhead; ++k) {
      rows_[count + k] = ahead_count_ > 0 ? ahead_[k] : rows_[count - 1];
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

  // One gradient row in double, for rows and coefficients of any magnitude, NaN included; out may
  // be null.
  void careful_gradient(Row<T> source, double a, double b, int exponent, T* out) {
    const PowerOfTwo scale(-exponent);
    for (int64_t i = 0; i < dim_; ++i) {
      const double c = scale(to_double(source[i]));
      if (out != nullptr) from_double(scale(a * to_double(query_[i]) + b * c), out + i);
      query_sum_[i] += a * c;
    }
  }

  void close_query_gradient(double b, T* out) {
    if (query_exponent_ == 0 && moderate(b)) {
      kernels_.query_gradient[dtype_]({query_, query_sum_, b, dim_, out, false});
      return;
    }
    const PowerOfTwo scale(-query_exponent_);
    for (int64_t i = 0; i < dim_; ++i)
      from_double(scale(query_sum_[i] + b * to_double(query_[i])), out + i);
  }

  const Kernels& kernels_;
  const ElvaDtype dtype_;
  const int64_t candidates_, dim_;
  Row<T> query_row_{}, positive_{};
  NegativeRows<T> negatives_{};
  bool dense_ = true;
  int64_t ahead_count_ = 0;
  int64_t live_count_ = 0;
  double query_norm_ = 0;
  int query_exponent_ = 0;
  const T* query_ = nullptr;  // dense, in range
  T* packed_query_;
  T* packed_[kBlock];
  T *nan_row_, *spare_row_;
  double* query_sum_;
  uint32_t* live_;
  const V* relevance_ = nullptr;  // of the live candidates; null: none is given
  RankBuffers<V> ranking_;
  double *dot_, *norm_, *score_;
  const void **rows_, **ahead_;
  void** outs_;
  bool* rescaled_;
  V* live_scores_;
  V* fast_coefficients_;
  double* own_coefficients_;
};

}  // namespace elva
#endif  // ELVA_CPU_REWARD_GROUP_H_
