// What: the inner loops of the grouped reward: dots and squared norms of a group's rows, its ranks,
//   then its gradient rows.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; cosine (1), rank (2), soft rank (6) and
//   their derivatives in elva_kernels.reference.
// In: dense rows [dim] of bf16, fp16, fp32 or fp64; scores of float or double.
// Out: double dots and squares; int32 ranks, double sums; gradient rows in the rows' dtype.
// Work split: the caller's thread, one job; 4 rows (NEON: 2) a pass over the query forward, 8
//   (NEON: 4), 4, 2 or 1 backward.
// Bytes: each row once forward, from memory; once more backward, from the second-level cache, and
//   written once.
// Numerics: 16 float lanes (8 double ones for fp64), at most kChain additions in each before they
//   are added to double lanes, then a tree. The query's gradient adds a pass's rows in float, and
//   those sums in double. bf16 dots use vdpbf16ps where the level has it: exact products, two
//   rounded additions; it takes subnormals for zero, which the caller's range check allows for.
//   Soft ranks in the scores' precision: a sigmoid errs by 1.5e-7 (3e-16 for double) at most. The
//   lanes of a row are the same in every block: its bits depend on it alone.
// Limits: finite rows with squared norms in the range of rescale.h; gradients without NaN or
//   overflow. Compiled once per CPU level, with ELVA_LEVEL set; nothing here has external linkage
//   but the table at the end.
// Reference: elva_kernels.reference.cosine_scores.
#include "kernels.h"
#include "simd_dots.h"

namespace elva {
namespace {

constexpr int64_t kChain = 16;  // of two additions each for paired bf16, of exact products
// A row has two sums, of four registers each under NEON, which has 32.
constexpr int kDotRows = ELVA_NEON_INSTRUCTIONS ? 2 : 4;
constexpr int kGradientRows = ELVA_NEON_INSTRUCTIONS ? 4 : 8;

template <int64_t kLanes>
double tree_sum(double* lanes) {
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// next: the rows after these, asked for ahead: a row is too short for the processor to see its
// stream coming.
template <class T, int R>
void dots_of_rows(const T* query, const T* const* rows, const T* const* next, int64_t dim,
                  double* dot, double* square) {
  using D = DotsFor<T>;
  using V = typename D::V;
  alignas(64) double dot_lanes[R][V::kLanes] = {};
  alignas(64) double square_lanes[R][V::kLanes] = {};
  const int64_t whole = dim - dim % D::kStep;
  for (int64_t i = 0; i < dim;) {
    V dots[R], squares[R];
    ELVA_UNROLL
    for (int r = 0; r < R; ++r) dots[r] = squares[r] = V::zero();
    const int64_t chain = i + kChain * D::kStep;
    const int64_t end = chain < whole ? chain : whole;
    for (; i < end; i += D::kStep) {
      const auto q = D::load(query + i);
      ELVA_UNROLL
      for (int r = 0; r < R; ++r) {
        const auto c = D::load(rows[r] + i);
        prefetch_far(next[r] + i);
        dots[r] = D::accumulate(dots[r], c, q);
        squares[r] = D::accumulate(squares[r], c, c);
      }
    }
    if (i == whole && i < dim) {
      const auto q = D::load(query + i, dim - i);
      ELVA_UNROLL
      for (int r = 0; r < R; ++r) {
        const auto c = D::load(rows[r] + i, dim - i);
        dots[r] = D::accumulate(dots[r], c, q);
        squares[r] = D::accumulate(squares[r], c, c);
      }
      i = dim;
    }
    ELVA_UNROLL
    for (int r = 0; r < R; ++r) {
      dots[r].add_to(dot_lanes[r]);
      squares[r].add_to(square_lanes[r]);
    }
  }
  ELVA_UNROLL
  for (int r = 0; r < R; ++r) {
    dot[r] = tree_sum<V::kLanes>(dot_lanes[r]);
    square[r] = tree_sum<V::kLanes>(square_lanes[r]);
  }
}

template <class T>
void dots(const DotJob& job) {
  const T* query = static_cast<const T*>(job.query);
  const T* const* rows = reinterpret_cast<const T* const*>(job.rows);
  int64_t i = 0;
  for (; job.count >= 4 && i + kDotRows <= job.count; i += kDotRows) {
    const T* const* next = rows + i + kDotAhead;
    dots_of_rows<T, kDotRows>(query, rows + i, next, job.dim, job.dot + i, job.square + i);
  }
  for (; i < job.count; ++i) {
    dots_of_rows<T, 1>(query, rows + i, rows + i, job.dim, job.dot + i, job.square + i);
  }
}

template <class T>
struct GradientRows {
  using V = VectorFor<T>;
  using S = typename V::Scalar;
  const T* query;
  const T* const* rows;
  T* const* outs;
  const S* a;
  const S* b;
  const T* const* ahead;
};

// kOut: writes the rows' gradients; kSum: adds to the query's sum.
template <class T, int R, bool kOut, bool kSum>
void gradients_of_rows(const GradientRows<T>& g, int64_t dim, double* query_sum, bool stream) {
  using V = VectorFor<T>;
  constexpr int64_t kVectors = kLine<T> / V::kLanes;
  // Copies, since a vector store may alias anything that is reached through a pointer.
  const T *rows[R], *ahead[R];
  T* outs[R];
  V a[R], b[R];
  const bool looks_ahead = g.ahead != nullptr;
  ELVA_UNROLL
  for (int r = 0; r < R; ++r) {
    rows[r] = g.rows[r];
    ahead[r] = looks_ahead ? g.ahead[r] : nullptr;
    outs[r] = kOut ? g.outs[r] : nullptr;
    a[r] = V::broadcast(g.a[r]);
    b[r] = kOut ? V::broadcast(g.b[r]) : V::zero();
  }
  int64_t i = 0;
  for (; i + kLine<T> <= dim; i += kLine<T>) {
    V q[kVectors], sum[kVectors];
    if (kOut) load_line(g.query + i, q);
    ELVA_UNROLL
    for (V& part : sum) part = V::zero();
    if (looks_ahead) {
      ELVA_UNROLL
      for (int r = 0; r < R; ++r) prefetch_far(ahead[r] + i);
    }
    ELVA_UNROLL
    for (int r = 0; r < R; ++r) {
      V c[kVectors], out[kVectors];
      load_line(rows[r] + i, c);
      ELVA_UNROLL
      for (int64_t v = 0; v < kVectors; ++v) {
        if (kOut) out[v] = fma(b[r], c[v], mul(a[r], q[v]));
        if (kSum) sum[v] = fma(a[r], c[v], sum[v]);
      }
      if (kOut) store_line(outs[r] + i, out, stream);
    }
    if (kSum) add_line<T>(query_sum + i, sum);
  }
  if (i == dim) return;
  V q[kVectors], sum[kVectors];
  if (kOut) load_line(PaddedLine<T>(g.query + i, dim - i).elements, q);
  ELVA_UNROLL
  for (V& part : sum) part = V::zero();
  ELVA_UNROLL
  for (int r = 0; r < R; ++r) {
    PaddedLine<T> line(rows[r] + i, dim - i);
    V c[kVectors], out[kVectors];
    load_line(line.elements, c);
    ELVA_UNROLL
    for (int64_t v = 0; v < kVectors; ++v) {
      if (kOut) out[v] = fma(b[r], c[v], mul(a[r], q[v]));
      if (kSum) sum[v] = fma(a[r], c[v], sum[v]);
    }
    if (kOut) {
      store_line(line.elements, out, false);
      memcpy(outs[r] + i, line.elements, static_cast<size_t>(dim - i) * sizeof(T));
    }
  }
  if (kSum) add_line<T>(query_sum + i, sum);
}

template <class T, bool kOut, bool kSum>
void gradients_of(const GradientJob& job) {
  using S = typename VectorFor<T>::Scalar;
  GradientRows<T> g{
      static_cast<const T*>(job.query),      reinterpret_cast<const T* const*>(job.rows),
      reinterpret_cast<T* const*>(job.outs), static_cast<const S*>(job.a),
      static_cast<const S*>(job.b),          reinterpret_cast<const T* const*>(job.ahead)};
  int64_t left = job.count;
  const auto advance = [&](int64_t rows) {
    g.rows += rows;
    g.a += rows;
    if (kOut) g.outs += rows, g.b += rows;
    if (g.ahead != nullptr) g.ahead += rows;
    left -= rows;
  };
  while (left >= kGradientRows) {
    gradients_of_rows<T, kGradientRows, kOut, kSum>(g, job.dim, job.query_sum, job.stream);
    advance(kGradientRows);
  }
  if (left >= 4) {
    gradients_of_rows<T, 4, kOut, kSum>(g, job.dim, job.query_sum, job.stream);
    advance(4);
  }
  if (left >= 2) {
    gradients_of_rows<T, 2, kOut, kSum>(g, job.dim, job.query_sum, job.stream);
    advance(2);
  }
  if (left == 1) gradients_of_rows<T, 1, kOut, kSum>(g, job.dim, job.query_sum, job.stream);
  if (kOut && job.stream) store_fence();
}

template <class T>
void gradients(const GradientJob& job) {
  if (job.outs == nullptr) return gradients_of<T, false, true>(job);
  if (job.query_sum == nullptr) return gradients_of<T, true, false>(job);
  gradients_of<T, true, true>(job);
}

template <class T>
void query_gradient(const QueryGradientJob& job) {
  using V = VectorFor<T>;
  const T* query = static_cast<const T*>(job.query);
  T* out = static_cast<T*>(job.out);
  for (int64_t i = 0; i < job.dim; i += kLine<T>) {
    const int64_t count = job.dim - i < kLine<T> ? job.dim - i : kLine<T>;
    alignas(64) double sums[kLine<T>] = {};
    for (int64_t k = 0; k < count; ++k)
      sums[k] = job.query_sum[i + k] + job.b * to_double(query[i + k]);
    V vectors[kLine<T> / V::kLanes];
    round_line<T>(sums, vectors);
    if (job.stream) {
      store_line(out + i, vectors, true);
      continue;
    }
    PaddedLine<T> line(query + i, count);
    store_line(line.elements, vectors, false);
    memcpy(out + i, line.elements, static_cast<size_t>(count) * sizeof(T));
  }
  if (job.stream) store_fence();
}

void count_ranks(const uint64_t* keys, int64_t count, int32_t* ranks) {
  for (int64_t i = 0; i < count; ++i) {
    uint64_t above = 0;
    for (int64_t k = 0; k < count; ++k) above += keys[k] > keys[i];
    ranks[i] = static_cast<int32_t>(1 + above);
  }
}

// The Taylor series of 2^x: ln(2)^k / k!.
template <class S, int kDegree>
struct Exp2Series {
  S coefficients[kDegree + 1] = {};
  constexpr Exp2Series() {
    double coefficient = 1;
    for (int k = 0; k <= kDegree; coefficient *= 0.6931471805599453 / ++k)
      coefficients[k] = static_cast<S>(coefficient);
  }
};

// 2^y for |y| <= kExp2Limit: the nearest integer as an exponent, times the series of the rest,
// which is at most 1/2: truncated at 5e-9, or 4e-18. 2^0 is exactly 1.
template <class V>
inline V exp2(V y) {  // a call would pass the vectors of AVX2 through memory
  using S = typename V::Scalar;
  constexpr bool kDouble = std::is_same_v<S, double>;
  constexpr int kDegree = kDouble ? 13 : 7;
  // A sum with it holds the integer, and the bias of the exponent field, in its lowest bits.
  const V shift = V::broadcast(kDouble ? S(0x1.8p52 + 1023) : S(0x1.8p23 + 127));
  const V shifted = add(y, shift);
  const V rest = sub(y, sub(shifted, shift));
  constexpr Exp2Series<S, kDegree> kSeries;
  V power = V::broadcast(kSeries.coefficients[kDegree]);
  for (int k = kDegree - 1; k >= 0; --k)
    power = fma(power, rest, V::broadcast(kSeries.coefficients[k]));
  return mul(power, exponent_of(shifted));
}

// Past it a sigmoid is 0 or 1 to more digits than are kept.
template <class S>
constexpr S kExp2Limit = std::is_same_v<S, double> ? S(700) : S(86);

// sums[i] = the terms of (i, j) over all j, the term added to `sum` by term(j, slope of i, e,
// sigma_ij, sum) with e = exp((s_i - s_j) / temperature) = (1 - sigma_ij) / sigma_ij. A candidate a
// lane: all lanes add in the same order, so equal scores have equal sums.
template <class V, class Term>
void sum_over_pairs(const PairJob& job, const Term& term) {
  using S = typename V::Scalar;
  constexpr double kLog2E = 1.4426950408889634;
  const S* scores = static_cast<const S*>(job.scores);
  const S* slopes = static_cast<const S*>(job.rank_slopes);
  // Never 0, which a difference that overflowed would turn into NaN.
  const double factor = kLog2E / job.temperature;
  constexpr S kLeast = std::numeric_limits<S>::min();
  const V scale = V::broadcast(factor > kLeast ? static_cast<S>(factor) : kLeast);
  const V one = V::broadcast(1);
  for (int64_t i = 0; i < job.count; i += V::kLanes) {
    const int64_t width = job.count - i < V::kLanes ? job.count - i : V::kLanes;
    const V score = V::load(PaddedLine<S>(scores + i, width).elements);
    const V slope = slopes == nullptr ? one : V::load(PaddedLine<S>(slopes + i, width).elements);
    alignas(64) double lanes[V::kLanes] = {};
    for (int64_t j = 0; j < job.count;) {
      const int64_t end = j + kChain < job.count ? j + kChain : job.count;
      V sum = V::zero();
      for (; j < end; ++j) {
        const V gap = mul(sub(score, V::broadcast(scores[j])), scale);
        const V e = exp2(clamp(gap, kExp2Limit<S>));
        sum = term(j, slope, e, div(one, add(one, e)), sum);
      }
      sum.add_to(lanes);
    }
    memcpy(job.sums + i, lanes, static_cast<size_t>(width) * sizeof(double));
  }
}

template <class V>
void soft_ranks(const PairJob& job) {
  sum_over_pairs<V>(job, [](int64_t, V, V, V sigma, V sum) { return add(sum, sigma); });
  // The pair of a candidate with itself gave exactly 1/2.
  for (int64_t i = 0; i < job.count; ++i) job.sums[i] += 0.5;
}

template <class V>
void soft_slopes(const PairJob& job) {
  const auto* slopes = static_cast<const typename V::Scalar*>(job.rank_slopes);
  sum_over_pairs<V>(job, [slopes](int64_t j, V slope, V e, V sigma, V sum) {
    return fma(mul(sigma, mul(e, sigma)), sub(V::broadcast(slopes[j]), slope), sum);
  });
}

}  // namespace

template <>
const Kernels Level<ELVA_LEVEL>::kernels = {
    {dots<Bf16>, dots<Fp16>, dots<float>, dots<double>},
    {gradients<Bf16>, gradients<Fp16>, gradients<float>, gradients<double>},
    {query_gradient<Bf16>, query_gradient<Fp16>, query_gradient<float>, query_gradient<double>},
    count_ranks,
    {soft_ranks<F32>, soft_ranks<F64>},
    {soft_slopes<F32>, soft_slopes<F64>},
    Level<ELVA_LEVEL>::scans,
    &Level<ELVA_LEVEL>::in_batch,
    &Level<ELVA_LEVEL>::matrix,
    &Level<ELVA_LEVEL>::codes,
};

}  // namespace elva
