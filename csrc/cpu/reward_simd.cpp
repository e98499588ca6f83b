// What: the inner loops of the grouped reward: dots and squared norms of a group's rows, then its gradient rows.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; eq. (1) and its derivatives in elva_kernels/reference.py.
// In: dense rows [dim] of bf16, fp16, fp32 or fp64. Out: double dots and squares; gradient rows in the rows' dtype.
// Work split: the caller's thread, one job; 4 rows a pass over the query forward, 8 rows backward.
// Bytes: each row once forward, from memory; once more backward, from the second-level cache, and written once.
// Numerics: 16 float lanes (8 double ones for fp64), at most kChain additions in each before they are added to double
//   lanes, then a tree. The query's gradient adds 8 rows in float, and those sums in double. bf16 dots use
//   vdpbf16ps where the level has it: exact products, two rounded additions; it takes subnormals for zero, which the
//   caller's range check allows for. The lanes of a row are the same in every block: its bits depend on it alone.
// Limits: finite rows with squared norms in the range of reward_group.h; gradients without NaN or overflow.
// Compiled once per CPU level, with ELVA_LEVEL set; nothing here has external linkage but the table at the end.
// Reference: elva_kernels.reference.cosine_scores.
#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace elva {
namespace {

constexpr int64_t kChain = 16;

template <class T>
using VectorFor = std::conditional_t<std::is_same_v<T, double>, F64, F32>;

// A vector of the first `count` elements at p and zeros.
template <class V, class T>
V load_part(const T* p, int64_t count) {
  T padded[V::kLanes] = {};
  memcpy(padded, p, static_cast<size_t>(count) * sizeof(T));
  return V::load(padded);
}

// Dot and square of R rows, one vector a step.
template <class T>
struct PlainDots {
  using V = VectorFor<T>;
  static constexpr int64_t kStep = V::kLanes;
  static constexpr int64_t kSteps = kChain;
  using Element = V;
  static Element load(const T* p) { return V::load(p); }
  static Element load(const T* p, int64_t count) { return load_part<V>(p, count); }
  static V accumulate(V sum, Element a, Element b) { return fma(a, b, sum); }
};

#if ELVA_BF16_INSTRUCTIONS
struct PairedDots {
  using V = F32;
  static constexpr int64_t kStep = 32;
  static constexpr int64_t kSteps = kChain / 2;  // a step is two additions
  using Element = __m512bh;
  static Element load(const Bf16* p) {
    Element x;
    memcpy(&x, p, sizeof(x));
    return x;
  }
  static Element load(const Bf16* p, int64_t count) {
    Bf16 padded[kStep] = {};
    memcpy(padded, p, static_cast<size_t>(count) * sizeof(Bf16));
    return load(padded);
  }
  static V accumulate(V sum, Element a, Element b) { return {_mm512_dpbf16_ps(sum.v, a, b)}; }
};
template <class T>
using DotsFor = std::conditional_t<std::is_same_v<T, Bf16>, PairedDots, PlainDots<T>>;
#else
template <class T>
using DotsFor = PlainDots<T>;
#endif

template <int64_t kLanes>
double tree_sum(double* lanes) {
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

template <class T, int R>
void dots_of_rows(const T* query, const T* const* rows, int64_t dim, double* dot, double* square) {
  using D = DotsFor<T>;
  using V = typename D::V;
  alignas(64) double dot_lanes[R][V::kLanes] = {};
  alignas(64) double square_lanes[R][V::kLanes] = {};
  const int64_t whole = dim - dim % D::kStep;
  for (int64_t i = 0; i < dim;) {
    V dots[R], squares[R];
    for (int r = 0; r < R; ++r) dots[r] = squares[r] = V::zero();
    const int64_t chain = i + D::kSteps * D::kStep;
    const int64_t end = chain < whole ? chain : whole;
    for (; i < end; i += D::kStep) {
      const auto q = D::load(query + i);
      for (int r = 0; r < R; ++r) {
        const auto c = D::load(rows[r] + i);
        dots[r] = D::accumulate(dots[r], c, q);
        squares[r] = D::accumulate(squares[r], c, c);
      }
    }
    if (i == whole && i < dim) {
      const auto q = D::load(query + i, dim - i);
      for (int r = 0; r < R; ++r) {
        const auto c = D::load(rows[r] + i, dim - i);
        dots[r] = D::accumulate(dots[r], c, q);
        squares[r] = D::accumulate(squares[r], c, c);
      }
      i = dim;
    }
    for (int r = 0; r < R; ++r) {
      dots[r].add_to(dot_lanes[r]);
      squares[r].add_to(square_lanes[r]);
    }
  }
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
  for (; i + 4 <= job.count; i += 4) {
    dots_of_rows<T, 4>(query, rows + i, job.dim, job.dot + i, job.square + i);
  }
  for (; i < job.count; ++i) {
    dots_of_rows<T, 1>(query, rows + i, job.dim, job.dot + i, job.square + i);
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
};

template <class T, int R>
void gradients_of_rows(const GradientRows<T>& g, int64_t dim, double* query_sum, bool stream) {
  using V = VectorFor<T>;
  constexpr int64_t kLine = 64 / sizeof(T);
  constexpr int64_t kVectors = kLine / V::kLanes;
  int64_t i = 0;
  for (; i + kLine <= dim; i += kLine) {
    V q[kVectors], sum[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) {
      q[v] = V::load(g.query + i + v * V::kLanes);
      sum[v] = V::zero();
    }
    for (int r = 0; r < R; ++r) {
      const V a = V::broadcast(g.a[r]), b = V::broadcast(g.b[r]);
      V out[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) {
        const V c = V::load(g.rows[r] + i + v * V::kLanes);
        out[v] = fma(b, c, mul(a, q[v]));
        sum[v] = fma(a, c, sum[v]);
      }
      store_line(g.outs[r] + i, out, stream);
    }
    for (int64_t v = 0; v < kVectors; ++v) sum[v].add_to(query_sum + i + v * V::kLanes);
  }
  for (; i < dim; i += V::kLanes) {
    const int64_t count = dim - i < V::kLanes ? dim - i : V::kLanes;
    const V q = load_part<V>(g.query + i, count);
    V sum = V::zero();
    for (int r = 0; r < R; ++r) {
      const V a = V::broadcast(g.a[r]), b = V::broadcast(g.b[r]);
      const V c = load_part<V>(g.rows[r] + i, count);
      V out[2] = {fma(b, c, mul(a, q)), V::zero()};
      sum = fma(a, c, sum);
      alignas(64) T line[kLine];
      store_line(line, out, false);
      memcpy(g.outs[r] + i, line, static_cast<size_t>(count) * sizeof(T));
    }
    sum.add_to(query_sum + i);
  }
}

template <class T>
void gradients(const GradientJob& job) {
  using S = typename VectorFor<T>::Scalar;
  GradientRows<T> g{static_cast<const T*>(job.query), reinterpret_cast<const T* const*>(job.rows),
                    reinterpret_cast<T* const*>(job.outs), static_cast<const S*>(job.a),
                    static_cast<const S*>(job.b)};
  int64_t left = job.count;
  const auto advance = [&](int64_t rows) {
    g.rows += rows;
    g.outs += rows;
    g.a += rows;
    g.b += rows;
    left -= rows;
  };
  while (left >= 8) {
    gradients_of_rows<T, 8>(g, job.dim, job.query_sum, job.stream);
    advance(8);
  }
  while (left > 0) {
    gradients_of_rows<T, 1>(g, job.dim, job.query_sum, job.stream);
    advance(1);
  }
  if (job.stream) store_fence();
}

template <class T>
void query_gradient(const QueryGradientJob& job) {
  using V = VectorFor<T>;
  constexpr int64_t kLine = 64 / sizeof(T);
  constexpr int64_t kVectors = kLine / V::kLanes;
  const T* query = static_cast<const T*>(job.query);
  T* out = static_cast<T*>(job.out);
  for (int64_t i = 0; i < job.dim; i += kLine) {
    const int64_t count = job.dim - i < kLine ? job.dim - i : kLine;
    alignas(64) double sums[kLine] = {};
    for (int64_t k = 0; k < count; ++k) {
      sums[k] = job.query_sum[i + k] + job.b * to_double(query[i + k]);
    }
    V vectors[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) vectors[v] = V::rounded(sums + v * V::kLanes);
    alignas(64) T line[kLine];
    store_line(line, vectors, false);
    memcpy(out + i, line, static_cast<size_t>(count) * sizeof(T));
  }
}

void count_ranks(const uint64_t* keys, int64_t count, int32_t* ranks) {
  for (int64_t i = 0; i < count; ++i) {
    uint64_t above = 0;
    for (int64_t k = 0; k < count; ++k) above += keys[k] > keys[i];
    ranks[i] = static_cast<int32_t>(1 + above);
  }
}

}  // namespace

#if ELVA_LEVEL == ELVA_LEVEL_AVX512BF16
#define ELVA_TABLE kAvx512Bf16Kernels
#define ELVA_NAME "avx512bf16"
#elif ELVA_LEVEL == ELVA_LEVEL_AVX512
#define ELVA_TABLE kAvx512Kernels
#define ELVA_NAME "avx512"
#elif ELVA_LEVEL == ELVA_LEVEL_AVX2
#define ELVA_TABLE kAvx2Kernels
#define ELVA_NAME "avx2"
#else
#define ELVA_TABLE kPlainKernels
#define ELVA_NAME "plain"
#endif

const Kernels ELVA_TABLE = {
    ELVA_NAME,
    {dots<Bf16>, dots<Fp16>, dots<float>, dots<double>},
    {gradients<Bf16>, gradients<Fp16>, gradients<float>, gradients<double>},
    {query_gradient<Bf16>, query_gradient<Fp16>, query_gradient<float>, query_gradient<double>},
    count_ranks,
};

}  // namespace elva
