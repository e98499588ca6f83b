// What: statistics of rows of in-batch scores, and what InfoNCE makes of the rows: softmax slopes
//   in place, sums over columns.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; negatives (9), rank (10), log-sum-exp (11),
//   contrastive losses (13) and (14) of elva_kernels.reference.
// In: dots of unit rows [R, padded M] in fp32 or fp64, positives, candidates to be skipped.
// Out: counts int32, hardest and top-k, sums double; the rows masked, then their slopes.
// Work split: rows, or blocks of columns, a thread at a time.
// Bytes: each row once from memory for all of its statistics, and once more for its slopes.
// Numerics: see in_batch_simd.cpp; ties by lower index. Deterministic: a row's bits depend on that
//   row alone, a column's on the chunks it came in.
// Limits: none.
// Reference: elva_kernels.reference.statistics_of_scores, info_nce_of_scores.
#include <math.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "../elva_in_batch.h"
#include "kernels.h"
#include "numeric.h"
#include "parallel.h"
#include "rescale.h"

namespace elva {
namespace {

constexpr int64_t kScoresPerPiece = 1 << 14;  // about 20 us
constexpr int64_t kScoresOfStatistics = 512;  // in the time that the rest of a row takes
constexpr int64_t kColumnsPerPiece = 64;

template <class S>
constexpr S kNone = -std::numeric_limits<S>::infinity();

template <class S>
constexpr S kSmallest = static_cast<S>(Range<S>::kSmallestScore);

template <class S>
struct Place {
  S score;
  int64_t index;
  bool operator<(const Place& other) const {
    return score > other.score || (score == other.score && index < other.index);
  }
};

// One thread's memory for rows of scores: the places of some, in the order in the end.
template <class S>
class Places {
 public:
  Places(const RowKernels<S>& kernels, int64_t width)
      : kernels_(kernels), found_(static_cast<size_t>(width) + 1) {}

  // Of a masked row: the first of those that score `hardest`, or -1.
  int64_t first(const S* row, int64_t width, S hardest) {
    if (!(hardest > kNone<S>)) return -1;
    kernels_.at_least(row, width, hardest, found_.data());
    return found_[0];
  }

  // The k first of a masked row; -inf and -1 where there are fewer.
  void top_k(const ScoreRowJob<S>& job, int64_t k, S* scores, int64_t* index) {
    const int64_t count = kernels_.at_least(job.row, job.width, least_of(job, k), found_.data());
    places_.clear();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = found_[static_cast<size_t>(i)];
      places_.push_back({job.row[at], at});
    }
    const int64_t there = std::min(k, count);
    if (there < count) std::nth_element(places_.begin(), places_.begin() + there, places_.end());
    std::sort(places_.begin(), places_.begin() + there);
    for (int64_t i = 0; i < k; ++i) {
      const Place<S> none{kNone<S>, -1};
      const Place<S>& place = i < there ? places_[static_cast<size_t>(i)] : none;
      scores[i] = place.score;
      index[i] = place.index;
    }
  }

 private:
  // A finite score that the k first are not below.
  S least_of(const ScoreRowJob<S>& job, int64_t k) {
    constexpr S kLowest = std::numeric_limits<S>::lowest();
    if (k <= kBests) {
      best_.assign(job.best, job.best + kBests);
    } else if (2 * kStripes * k <= job.width) {  // else there is little to pass over
      best_.assign(job.row, job.row + kStripes * k);
      for (int64_t j = kStripes * k; j < job.width;) {
        const int64_t there = std::min(kStripes * k, job.width - j);
        for (int64_t i = 0; i < there; ++i, ++j) {
          S& best = best_[static_cast<size_t>(i)];
          best = job.row[j] > best ? job.row[j] : best;
        }
      }
    } else {
      return kLowest;
    }
    // Of the best of as many disjoint parts of the row, the k-th: k scores are no less.
    std::nth_element(best_.begin(), best_.begin() + k - 1, best_.end(), std::greater<S>());
    return std::max(best_[static_cast<size_t>(k - 1)], kLowest);
  }

  static constexpr int64_t kStripes = 4;  // parts of a row for each score wanted: ours

  const RowKernels<S>& kernels_;
  std::vector<int64_t> found_;
  std::vector<Place<S>> places_;
  std::vector<S> best_;
};

// Of a query without a sound positive: what counts against NaN, which is less than any number and
// equals NaN. Candidates that are not finite are excluded; a query that is not finite has no other
// scores.
template <class S>
void count_below_all(const ElvaScoreRowsArgs& args, const ScoreRowJob<S>& job, bool bad_query,
                     int32_t* n_greater, int32_t* n_equal) {
  std::vector<char> rival(static_cast<size_t>(args.candidates), 1);
  const auto strike = [&](int64_t j) {
    if (j >= 0 && j < args.candidates) rival[static_cast<size_t>(j)] = 0;
  };
  for (int64_t p = 0; p < job.positives; ++p) strike(job.target[p]);
  for (int64_t s = 0; s < job.segments; ++s) {
    for (int64_t x = job.skipped_first[s]; x < job.skipped_last[s]; ++x) strike(job.skipped[x]);
  }
  int64_t greater = 0, equal = 0;
  for (int64_t j = 0; j < args.candidates; ++j) {
    if (rival[static_cast<size_t>(j)] == 0) continue;
    const bool bad = bad_query || job.exclusion[j] < 0;
    equal += bad;
    greater += !bad && job.row[j] > kNone<S>;
  }
  *n_greater = static_cast<int32_t>(greater);
  *n_equal = static_cast<int32_t>(equal);
}

// The score of a positive by the arithmetic of mask_row, before the row is masked.
template <class S>
S score_of(const ScoreRowJob<S>& job, bool bad_query, int64_t target) {
  if (target == -1) return kNone<S>;
  if (target < 0 || bad_query || job.exclusion[target] < 0)
    return std::numeric_limits<S>::quiet_NaN();
  S own = job.row[target];
  if (job.scale != nullptr) {
    own = own * job.row_scale * job.scale[target];
    own = std::fabs(own) < kSmallest<S> ? S(0) : own;
  }
  // + 0: not -0, which a sum with the exclusion does not keep either.
  return std::min(S(1), std::max(S(-1), own)) + S(0);
}

// The counts of a masked row against its positives, of which score_row has counted the first.
template <class S>
void count_positives(const ElvaScoreRowsArgs& args, const RowKernels<S>& kernels,
                     const ScoreRowJob<S>& job, bool bad_query, const S* own, int32_t* n_greater,
                     int32_t* n_equal) {
  int64_t places[kThresholds], count = 0;
  S thresholds[kThresholds];
  const auto count_them = [&] {
    int64_t greater[kThresholds], equal[kThresholds];
    for (int64_t i = count; i < kThresholds; ++i)
      thresholds[i] = std::numeric_limits<S>::quiet_NaN();
    kernels.count_row(job.row, job.width, thresholds, greater, equal);
    for (int64_t i = 0; i < count; ++i) {
      n_greater[places[i]] = static_cast<int32_t>(greater[i]);
      n_equal[places[i]] = static_cast<int32_t>(equal[i]);
    }
    count = 0;
  };
  bool none_is_bad = true;
  int32_t bad_greater = 0, bad_equal = 0;
  for (int64_t p = 0; p < job.positives; ++p) {
    if (std::isnan(own[p])) {
      if (none_is_bad) count_below_all(args, job, bad_query, &bad_greater, &bad_equal);
      none_is_bad = false;
      n_greater[p] = bad_greater;
      n_equal[p] = bad_equal;
    } else if (p > 0) {
      n_greater[p] = n_equal[p] = 0;
      if (own[p] == kNone<S> || own[p] > job.hardest) continue;
      places[count] = p;
      thresholds[count++] = own[p];
      if (count == kThresholds) count_them();
    }
  }
  if (count > 0) count_them();
}

template <class S>
ScoreRowJob<S> job_of(const ElvaScoreRowsArgs& args, int64_t i, bool bad_query) {
  ScoreRowJob<S> job = {};
  job.row = static_cast<S*>(args.scores) + i * args.width;
  job.width = args.width;
  job.exclusion = static_cast<const S*>(args.exclusion);
  job.scale = static_cast<const S*>(args.scale);
  job.row_scale = bad_query ? S(0) : static_cast<S>(args.norm[2 * i]);
  job.smallest = kSmallest<S>;
  job.max_score = bad_query ? kNone<S> : static_cast<S>(args.max_score);
  job.candidates = args.candidates;
  job.target = args.target + i * args.positives;
  job.positives = args.positives;
  if (args.skipped != nullptr) {
    job.skipped = args.skipped;
    job.skipped_first = args.skipped_first + i * args.segments;
    job.skipped_last = args.skipped_last + i * args.segments;
    job.segments = args.segments;
  }
  job.inverse_temperature = static_cast<S>(args.inverse_temperature);
  return job;
}

template <class S>
void one_row(const ElvaScoreRowsArgs& args, const RowKernels<S>& kernels, int64_t i,
             Places<S>* places) {
  const bool bad_query = !(args.norm[2 * i] == args.norm[2 * i]);
  ScoreRowJob<S> job = job_of<S>(args, i, bad_query);
  S* own = static_cast<S*>(args.target_score) + i * args.positives;
  for (int64_t p = 0; p < args.positives; ++p) own[p] = score_of(job, bad_query, job.target[p]);
  job.target_score = own[0] == kNone<S> ? std::numeric_limits<S>::quiet_NaN() : own[0];
  kernels.score_row(&job);
  int32_t* n_greater = args.n_greater + i * args.positives;
  int32_t* n_equal = args.n_equal + i * args.positives;
  n_greater[0] = static_cast<int32_t>(job.n_greater);
  n_equal[0] = static_cast<int32_t>(job.n_equal);
  count_positives<S>(args, kernels, job, bad_query, own, n_greater, n_equal);
  for (int64_t p = 0; p < args.positives; ++p)
    args.rank[i * args.positives + p] = n_greater[p] + n_equal[p] + (job.target[p] != -1);
  static_cast<S*>(args.hardest_score)[i] = job.hardest;
  args.hardest_index[i] = places->first(job.row, args.width, job.hardest);
  args.sum[i] = job.sum;
  args.moment[i] = job.moment;
  if (args.k > 0) {
    places->top_k(job, args.k, static_cast<S*>(args.topk_scores) + i * args.k,
                  args.topk_index + i * args.k);
  }
}

template <class S>
ElvaStatus score_rows(const ElvaScoreRowsArgs& args) {
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) return ELVA_BAD_LEVEL;
  const RowKernels<S>& rows = row_kernels<S>(*kernels->in_batch);
  const int64_t grain = kScoresPerPiece / (args.width + kScoresOfStatistics);
  return for_pieces(args.rows, std::max<int64_t>(1, grain), args.threads,
                    [&](int64_t begin, int64_t end) {
                      Places<S> places(rows, args.width);
                      for (int64_t i = begin; i < end; ++i) one_row<S>(args, rows, i, &places);
                    });
}

template <class S>
ElvaStatus info_nce_terms(const ElvaInfoNceTermsArgs& args) {
  const double t = args.temperature;
  for (int64_t i = 0; i < args.count; ++i) {
    const int64_t at = args.at == nullptr ? i : args.at[i];
    const double target = static_cast<double>(static_cast<const S*>(args.target_score)[i]);
    if (!std::isfinite(target)) {
      const bool none = target < 0;
      args.loss[i] = none ? 0.0 : std::numeric_limits<double>::quiet_NaN();
      args.share[i] = args.others[i] = args.grad_temperature[i] = 0;
      continue;
    }
    const double found = static_cast<double>(static_cast<const S*>(args.peak)[at]);
    const double peak = found > kNone<double> ? found : target;
    const double top = std::max(peak, target);
    const double weight = std::exp((peak - top) / t);
    const double rest = weight * args.sum[at];
    const double whole = rest + std::exp((target - top) / t);
    // A small loss is the logarithm of a number near 1.
    args.loss[i] = top == target ? std::log1p(rest) : std::log(whole) + (top - target) / t;
    const double share = weight / whole;
    args.share[i] = share;
    args.others[i] = share * args.sum[at];
    args.grad_temperature[i] =
        -share * (args.moment[at] + args.sum[at] * (peak - target)) / (t * t);
  }
  return ELVA_OK;
}

template <class S>
ElvaStatus logsumexp(const ElvaLogSumExpArgs& args) {
  const double t = args.temperature;
  for (int64_t i = 0; i < args.rows; ++i) {
    const S* targets = static_cast<const S*>(args.target_score) + i * args.positives;
    double top = static_cast<double>(static_cast<const S*>(args.peak)[i]);
    const double peak = top;
    bool sound = true;
    for (int64_t p = 0; p < args.positives; ++p) {
      sound = sound && !std::isnan(targets[p]);
      top = std::max(top, static_cast<double>(targets[p]));
    }
    double sum = 0;
    const auto add = [&](double score, double count) {
      if (score > kNone<double>) sum += count * std::exp((score - top) / t);
    };
    for (int64_t p = 0; p < args.positives; ++p) add(static_cast<double>(targets[p]), 1);
    add(peak, args.sum[i]);
    const double found = sum > 0 || std::isnan(sum) ? top / t + std::log(sum) : kNone<double>;
    static_cast<S*>(args.logsumexp)[i] =
        sound ? static_cast<S>(found) : std::numeric_limits<S>::quiet_NaN();
  }
  return ELVA_OK;
}

template <class S>
ElvaStatus info_nce_factors(const ElvaInfoNceFactorsArgs& args) {
  for (int64_t i = 0; i < args.rows; ++i) {
    const int64_t first = i * args.positives;
    const int64_t* target = args.target + first;
    const int64_t none = std::count(target, target + args.positives, -1);
    const double weight = args.weight_factor * args.weight[i] /
                          static_cast<double>(std::max<int64_t>(args.positives - none, 1));
    double factor = 0;
    for (int64_t x = first; x < first + args.positives; ++x) {
      const bool sound = std::isfinite(static_cast<const S*>(args.target_score)[x]);
      args.upstream[x] = sound ? weight : 0.0;
      const double upstream = args.upstream[x] / args.temperature;
      double others = upstream * args.others[x];
      if (args.more_others != nullptr) others += upstream * args.more_others[x];
      static_cast<S*>(args.target_slope)[x] = static_cast<S>(-others);
      factor += upstream * args.share[x];
    }
    static_cast<S*>(args.row_factor)[i] = static_cast<S>(factor);
    const S peak = static_cast<const S*>(args.peak)[i];
    static_cast<S*>(args.row_peak)[i] = peak > kNone<S> ? peak : S(0);
  }
  return ELVA_OK;
}

template <class S>
ElvaStatus slope_rows(const ElvaSlopeRowsArgs& args) {
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) return ELVA_BAD_LEVEL;
  parallel_for(args.rows, std::max<int64_t>(1, kScoresPerPiece / args.width), args.threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   S* row = static_cast<S*>(args.scores) + i * args.width;
                   row_kernels<S>(*kernels->in_batch)
                       .slope_row({row, args.width, static_cast<const S*>(args.row_peak)[i],
                                   static_cast<const S*>(args.row_factor)[i],
                                   static_cast<const S*>(args.column_peak),
                                   static_cast<const S*>(args.column_factor),
                                   static_cast<S>(args.inverse_temperature)});
                   if (args.target_slope == nullptr) continue;
                   for (int64_t p = i * args.positives; p < (i + 1) * args.positives; ++p) {
                     if (args.target[p] < 0) continue;  // masked to -inf, so its slope is 0
                     row[args.target[p]] += static_cast<const S*>(args.target_slope)[p];
                   }
                 }
               });
  return ELVA_OK;
}

template <class S>
ElvaStatus spread_rows(const ElvaSpreadRowsArgs& args) {
  parallel_for(args.rows, std::max<int64_t>(1, kScoresPerPiece / args.width), args.threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t* index = args.index + i * args.columns;
                   const S* slopes = static_cast<const S*>(args.slopes) + i * args.columns;
                   S* out = static_cast<S*>(args.out) + i * args.width;
                   std::fill(out, out + args.width, S(0));
                   for (int64_t x = 0; x < args.columns; ++x) {
                     if (index[x] >= 0) out[index[x]] += slopes[x];
                   }
                 }
               });
  return ELVA_OK;
}

template <class S>
ElvaStatus column_sums(const ElvaColumnSumsArgs& args) {
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) return ELVA_BAD_LEVEL;
  const int64_t pieces = (args.width - 1) / kColumnsPerPiece + 1;
  parallel_for(pieces, 1, args.threads, [&](int64_t begin, int64_t end) {
    const int64_t j = begin * kColumnsPerPiece;
    row_kernels<S>(*kernels->in_batch)
        .columns({static_cast<const S*>(args.scores) + j, args.rows, args.width,
                  std::min(end * kColumnsPerPiece, args.width) - j,
                  static_cast<S>(args.inverse_temperature), static_cast<S*>(args.peak) + j,
                  args.sum + j, args.moment + j});
  });
  return ELVA_OK;
}

}  // namespace
}  // namespace elva

extern "C" {

ElvaStatus elva_score_rows_cpu(const ElvaScoreRowsArgs* args) {
  return elva::by_value_dtype(
      args->dtype, [args](auto value) { return elva::score_rows<decltype(value)>(*args); });
}

ElvaStatus elva_info_nce_terms_cpu(const ElvaInfoNceTermsArgs* args) {
  return elva::by_value_dtype(
      args->dtype, [args](auto value) { return elva::info_nce_terms<decltype(value)>(*args); });
}

ElvaStatus elva_logsumexp_cpu(const ElvaLogSumExpArgs* args) {
  return elva::by_value_dtype(
      args->dtype, [args](auto value) { return elva::logsumexp<decltype(value)>(*args); });
}

ElvaStatus elva_info_nce_factors_cpu(const ElvaInfoNceFactorsArgs* args) {
  return elva::by_value_dtype(
      args->dtype, [args](auto value) { return elva::info_nce_factors<decltype(value)>(*args); });
}

ElvaStatus elva_slope_rows_cpu(const ElvaSlopeRowsArgs* args) {
  return elva::by_value_dtype(
      args->dtype, [args](auto value) { return elva::slope_rows<decltype(value)>(*args); });
}

ElvaStatus elva_spread_rows_cpu(const ElvaSpreadRowsArgs* args) {
  return elva::by_value_dtype(
      args->dtype, [args](auto value) { return elva::spread_rows<decltype(value)>(*args); });
}

ElvaStatus elva_column_sums_cpu(const ElvaColumnSumsArgs* args) {
  return elva::by_value_dtype(
      args->dtype, [args](auto value) { return elva::column_sums<decltype(value)>(*args); });
}

}  // extern "C"
