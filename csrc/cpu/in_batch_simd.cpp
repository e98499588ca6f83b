// What: the inner loops of the in-batch ops: cosines, masks, counts and sums over rows of scores,
//   softmax slopes in place, sums over columns.
// Source: cosine (8), negatives (9), rank (10), log-sum-exp (11), contrastive losses (13) and (14)
//   of elva_kernels.reference.
// In: dense rows of float or double, dots of unit rows or masked scores: see in_batch_kernels.h.
// Out: the rows masked, or their slopes; counts, the best, sums: see in_batch_kernels.h.
// Work split: the caller's thread, one job.
// Bytes: a row of scores is touched while it is in the caches.
// Numerics: exp by a polynomial (2e-7, 4e-16 relative), 0 below exp(-87) (exp(-708)); at most
//   kChain additions in an accumulator before they are added to a double one. Deterministic.
// Limits: rows padded to kRowPadding. Compiled once per CPU level, with ELVA_LEVEL set; nothing
//   here has external linkage but the table at the end.
// Reference: elva_kernels.reference.
#include <limits>

#include "kernels.h"
#include "simd.h"

namespace elva {
namespace {

constexpr int64_t kChain = 32;

// 64 bytes of S, and integers as wide: the compiler's own vectors, which every level has.
template <class S>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vector __attribute__((vector_size(64)));
  typedef int32_t Mask __attribute__((vector_size(64)));
  static constexpr float kLowest = -87.0f;
  static constexpr float kShifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kHigh = 0.693359375f, kLow = -2.12194440e-4f;  // ln 2 in two parts
  static constexpr int kDegree = 7;
  static constexpr int kMantissa = 23;
  static constexpr int32_t kOne = 0x3f800000;
};
template <>
struct Lanes<double> {
  typedef double Vector __attribute__((vector_size(64)));
  typedef int64_t Mask __attribute__((vector_size(64)));
  static constexpr double kLowest = -708.0;
  static constexpr double kShifter = 6755399441055744.0;
  static constexpr double kHigh = 6.93147180369123816490e-1, kLow = 1.90821492927058770002e-10;
  static constexpr int kDegree = 13;
  static constexpr int kMantissa = 52;
  static constexpr int64_t kOne = 0x3ff0000000000000;
};
template <class S>
using Vec = typename Lanes<S>::Vector;
template <class S>
using Mask = typename Lanes<S>::Mask;
template <class S>
constexpr int64_t kLanes = 64 / static_cast<int64_t>(sizeof(S));
template <class S>
constexpr S kNone = -std::numeric_limits<S>::infinity();

template <class S>
inline Vec<S> load(const S* p) {
  Vec<S> x;
  memcpy(&x, p, sizeof(x));
  return x;
}
template <class S>
inline void store(S* p, Vec<S> x) {
  memcpy(p, &x, sizeof(x));
}
template <class S>
inline Vec<S> all(S x) {
  return Vec<S>{} + x;
}
template <class S>
inline Vec<S> larger(Vec<S> a, Vec<S> b) {
  return a > b ? a : b;
}
template <class S>
S largest(Vec<S> x) {
  S out = x[0];
  for (int64_t i = 1; i < kLanes<S>; ++i) out = x[i] > out ? x[i] : out;
  return out;
}

// exp(x) for x <= 0, -inf included.
template <class S>
inline Vec<S> exp_of(Vec<S> x) {
  using L = Lanes<S>;
  const Mask<S> vanishes = x < L::kLowest;
  x = larger<S>(x, all<S>(L::kLowest));
  const Vec<S> shifted = x * S(1.442695040888963407) + L::kShifter;
  const Vec<S> n = shifted - L::kShifter;
  const Vec<S> r = (x - n * L::kHigh) - n * L::kLow;
  S factorial = 1;
  for (int i = 2; i <= L::kDegree; ++i) factorial *= S(i);
  Vec<S> sum = all<S>(1 / factorial);
  for (int i = L::kDegree - 1; i >= 0; --i) {
    factorial /= S(i + 1);
    sum = sum * r + 1 / factorial;
  }
  Mask<S> bits;
  memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << L::kMantissa) + L::kOne;
  Vec<S> power;
  memcpy(&power, &bits, sizeof(power));
  return vanishes ? all<S>(0) : sum * power;
}

template <class S>
void add_lanes(double* sums, Vec<S> x) {
  for (int64_t i = 0; i < kLanes<S>; ++i) sums[i] += static_cast<double>(x[i]);
}

double tree_sum(double* lanes, int64_t count) {
  for (int64_t width = count / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

template <class S>
void mask_row(const ScoreRowJob<S>& job) {
  const Vec<S> none = all<S>(kNone<S>), limit = all<S>(job.max_score);
  for (int64_t j = 0; j < job.width; j += kLanes<S>) {
    Vec<S> x = load(job.row + j);
    if (job.scale != nullptr) {
      x = x * job.row_scale * load(job.scale + j);
      x = ((x < job.smallest) & (x > -job.smallest)) ? all<S>(0) : x;
    }
    x = larger<S>(x, all<S>(-1));
    x = x < S(1) ? x : all<S>(1);
    x = x > limit ? none : x + load(job.exclusion + j);
    store(job.row + j, x);
  }
  const auto strike = [&](int64_t j) {
    if (j >= 0 && j < job.candidates) job.row[j] = kNone<S>;
  };
  for (int64_t s = 0; s < job.segments; ++s) {
    for (int64_t x = job.skipped_first[s]; x < job.skipped_last[s]; ++x) strike(job.skipped[x]);
  }
  for (int64_t p = 0; p < job.positives; ++p) strike(job.target[p]);
}

template <class S>
int64_t lane_sum(Mask<S> x) {
  int64_t sum = 0;
  for (int64_t i = 0; i < kLanes<S>; ++i) sum += x[i];
  return sum;
}

template <class S>
void count_row(const S* row, int64_t width, const S* thresholds, int64_t* greater, int64_t* equal) {
  Mask<S> above[kThresholds] = {}, same[kThresholds] = {};
  for (int64_t j = 0; j < width; j += kLanes<S>) {
    const Vec<S> x = load(row + j);
    for (int64_t t = 0; t < kThresholds; ++t) {
      above[t] -= x > thresholds[t];
      same[t] -= x == thresholds[t];
    }
  }
  for (int64_t t = 0; t < kThresholds; ++t) {
    greater[t] = lane_sum<S>(above[t]);
    equal[t] = lane_sum<S>(same[t]);
  }
}

template <class S>
void score_row(ScoreRowJob<S>* job) {
  mask_row(*job);
  Mask<S> greater = {}, equal = {};
  constexpr int64_t kVectors = kBests / kLanes<S>;
  Vec<S> bests[kVectors];
  for (int64_t v = 0; v < kVectors; ++v) bests[v] = all<S>(kNone<S>);
  const auto look = [&](int64_t j, int64_t v) {
    const Vec<S> x = load(job->row + j);
    greater -= x > job->target_score;
    equal -= x == job->target_score;
    bests[v] = larger<S>(x, bests[v]);
  };
  int64_t at = 0;
  for (; at + kBests <= job->width; at += kBests) {
    for (int64_t v = 0; v < kVectors; ++v) look(at + v * kLanes<S>, v);
  }
  for (; at < job->width; at += kLanes<S>) look(at, at % kBests / kLanes<S>);
  for (int64_t v = 0; v < kVectors; ++v) store(job->best + v * kLanes<S>, bests[v]);
  Vec<S> best = bests[0];
  for (int64_t v = 1; v < kVectors; ++v) best = larger<S>(bests[v], best);
  job->n_greater = lane_sum<S>(greater);
  job->n_equal = lane_sum<S>(equal);
  job->hardest = largest<S>(best);
  job->sum = job->moment = 0;
  if (!(job->inverse_temperature >= 0) || job->hardest == kNone<S>) return;
  double sums[kLanes<S>] = {}, moments[kLanes<S>] = {};
  for (int64_t j = 0; j < job->width;) {
    const int64_t chain = j + kChain * kLanes<S>;
    const int64_t end = chain < job->width ? chain : job->width;
    Vec<S> sum = {}, moment = {};
    for (; j < end; j += kLanes<S>) {
      const Vec<S> gap = load(job->row + j) - job->hardest;
      const Vec<S> term = exp_of<S>(gap * job->inverse_temperature);
      sum += term;
      moment += term * larger<S>(gap, all<S>(-2));  // not 0 times -inf
    }
    add_lanes<S>(sums, sum);
    add_lanes<S>(moments, moment);
  }
  job->sum = tree_sum(sums, kLanes<S>);
  job->moment = tree_sum(moments, kLanes<S>);
}

template <class S>
int64_t at_least(const S* row, int64_t width, S least, int64_t* index) {
  int64_t count = 0;
  for (int64_t j = 0; j < width; j += kBests) {
    const int64_t end = j + kBests < width ? j + kBests : width;
    Mask<S> any = {};
    for (int64_t i = j; i < end; i += kLanes<S>) any |= load(row + i) >= least;
    uint64_t words[sizeof(any) / sizeof(uint64_t)], some = 0;
    memcpy(words, &any, sizeof(any));
    for (const uint64_t word : words) some |= word;
    if (some == 0) continue;
    for (int64_t i = j; i < end; ++i) {
      index[count] = i;
      count += row[i] >= least;
    }
  }
  return count;
}

template <class S>
void slope_row(const SlopeRowJob<S>& job) {
  for (int64_t j = 0; j < job.width; j += kLanes<S>) {
    const Vec<S> x = load(job.row + j);
    Vec<S> slope = exp_of<S>((x - job.row_peak) * job.inverse_temperature) * job.row_factor;
    if (job.column_peak != nullptr) {
      const Vec<S> gap = x - load(job.column_peak + j);
      slope += exp_of<S>(gap * job.inverse_temperature) * load(job.column_factor + j);
    }
    store(job.row + j, slope);
  }
}

template <class S>
void columns_of(const ColumnJob<S>& job, int64_t j) {
  const Vec<S> old = load(job.peak + j);
  Vec<S> peak = old;
  for (int64_t i = 0; i < job.rows; ++i) {
    peak = larger<S>(load(job.scores + i * job.stride + j), peak);
  }
  store(job.peak + j, peak);
  const Vec<S> base = peak > kNone<S> ? peak : all<S>(0);  // not -inf minus -inf
  const Vec<S> grown = old > kNone<S> ? old - base : all<S>(0);
  const Vec<S> shrink = exp_of<S>(grown * job.inverse_temperature);
  double sums[kLanes<S>], moments[kLanes<S>];
  for (int64_t l = 0; l < kLanes<S>; ++l) {
    const double factor = static_cast<double>(shrink[l]), before = job.sum[j + l];
    sums[l] = before * factor;
    moments[l] = (job.moment[j + l] + before * static_cast<double>(grown[l])) * factor;
  }
  for (int64_t i = 0; i < job.rows;) {
    const int64_t end = i + kChain < job.rows ? i + kChain : job.rows;
    Vec<S> sum = {}, moment = {};
    for (; i < end; ++i) {
      const Vec<S> gap = load(job.scores + i * job.stride + j) - base;
      const Vec<S> term = exp_of<S>(gap * job.inverse_temperature);
      sum += term;
      moment += term * larger<S>(gap, all<S>(-2));
    }
    add_lanes<S>(sums, sum);
    add_lanes<S>(moments, moment);
  }
  memcpy(job.sum + j, sums, sizeof(sums));
  memcpy(job.moment + j, moments, sizeof(moments));
}

template <class S>
void columns(const ColumnJob<S>& job) {
  for (int64_t j = 0; j < job.columns; j += kLanes<S>) columns_of(job, j);
}

}  // namespace

template <>
const InBatchKernels Level<ELVA_LEVEL>::in_batch = {
    {score_row<float>, count_row<float>, at_least<float>, slope_row<float>, columns<float>},
    {score_row<double>, count_row<double>, at_least<double>, slope_row<double>, columns<double>},
};

}  // namespace elva
