// The gradients of a group from its coefficients (reward_group.h): some columns on a block of 256
// threads, up to 64 vectors at a time; negatives in 4 classes, the n-th in class n mod 4. The same
// to the last bit whichever kernel runs it.
#ifndef ELVA_CUDA_REWARD_GRADIENT_H_
#define ELVA_CUDA_REWARD_GRADIENT_H_

#include "rows.h"

namespace elva {

constexpr int kMostWide = 64, kClasses = 4, kGradientThreads = kMostWide * kClasses;
constexpr int kTogether = 4;       // rows of a class whose products are summed first
constexpr double kUnit = 0x1p192;  // of terms over the smallest norm of floats

// How many vectors of a row are taken at a time, where it has `vectors`.
__host__ __device__ inline int wide_of(int64_t vectors) {
  const int64_t passes = (vectors + kMostWide - 1) / kMostWide;
  return passes == 0 ? 1 : static_cast<int>((vectors + passes - 1) / passes);
}

// Shared memory that gradient_columns takes: coefficients, then sums of two classes.
template <class T>
__host__ __device__ inline size_t gradient_shared(int64_t negatives, int wide) {
  const size_t some =
      static_cast<size_t>(negatives < kGradientThreads ? negatives : kGradientThreads);
  const size_t coefficients = some * sizeof(float2);
  const size_t sums = 2 * static_cast<size_t>(wide) * Vector<T>::kSize * sizeof(float);
  return ((coefficients > sums ? coefficients : sums) + 15) / 16 * 16;
}

// All rows dense and on 16 bytes, in and out.
template <class T>
bool has_whole_rows(const ElvaRewardArgs& args) {
  const auto whole = [](int64_t elements) { return elements % Vector<T>::kSize == 0; };
  const auto fits = [&](const ElvaInput& input, bool has_rows) {
    bool fine = input.stride == 1 && reinterpret_cast<uintptr_t>(input.data) % 16 == 0;
    for (int32_t i = 0; i < args.batch.ndim; ++i) fine = fine && whole(input.batch_strides[i]);
    return fine && (!has_rows || whole(input.row_stride));
  };
  const auto out = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const int64_t rows = args.index.data == nullptr ? args.negatives : args.bank_rows;
  return whole(args.dim) && fits(args.query, false) && fits(args.positive, false) &&
         (rows == 0 || fits(args.negative, rows > 1)) && out(args.grad_query) &&
         out(args.grad_positive) && out(args.grad_negative);
}

// Products of floats with it are in range.
__device__ inline bool is_moderate(double x) {
  const double magnitude = fabs(x);
  return magnitude == 0 || (magnitude >= 0x1p-100 && magnitude <= 0x1p100);
}

// A candidate's coefficients of the query and of its row as floats: both 0 where its gradient is,
// NaN where doubles are needed.
__device__ inline float2 fast_coefficients(double a, double b, double upstream) {
  if (a == 0 && b == 0) return {0, 0};  // masked, or a zero row
  const double by_query = upstream * a, by_row = upstream * b;
  // Zeros by `upstream` multiply their rows: NaN stays NaN.
  const bool fast = is_moderate(by_query) && is_moderate(by_row) && (by_query != 0 || by_row != 0);
  if (!fast) return {NAN, NAN};
  return {static_cast<float>(by_query), static_cast<float>(by_row)};
}

// Whose gradients the caller wants.
struct Wanted {
  bool query, positive, negatives;

  __host__ __device__ explicit Wanted(const ElvaRewardArgs& args)
      : query(args.grad_query != nullptr),
        positive(args.grad_positive != nullptr),
        negatives(args.grad_negative != nullptr) {}

  __host__ __device__ bool any() const { return query || positive || negatives; }
  // Candidate c's, or the query's (-1).
  __device__ bool of(int64_t c) const { return c < 0 ? query : c == 0 ? positive : negatives; }
  // How many negatives matter to them.
  __device__ int64_t count(int64_t all) const { return query || negatives ? all : 0; }
};

template <class T, class V>
__device__ inline Vector<T> packed(const V* x) {
  Vector<T> out;
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) narrow(x[i], out.at + i);
  return out;
}

// One group's gradients in a thread's vector of columns. Rows has the columns of the query, of the
// positive and of negatives (read_query() and the like; read_negative(n, false) anything finite), and
// takes their gradients (write_query(gradient) and the like), with kNegatives of all rows, else not
// of the negatives; kAhead rows are read at once.
template <class T, int kAhead, bool kNegatives, class Rows>
class GradientColumns {
  static constexpr int kSize = Vector<T>::kSize;

 public:
  // `wide` as wide_of; `columns` vectors from this pass's first on are the group's. a, b: of the
  // candidates, as reward_group.h.
  __device__ GradientColumns(int wide, int64_t columns, const double* a, const double* b,
                             double upstream, unsigned char* shared, const Rows& rows)
      : wide_(wide),
        at_(static_cast<int>(threadIdx.x) % wide),
        class_(static_cast<int>(threadIdx.x) / wide),
        works_(class_ < kClasses && at_ < columns),
        a_(a),
        b_(b),
        upstream_(upstream),
        fast_(reinterpret_cast<float2*>(shared)),
        sums_(reinterpret_cast<float*>(shared)),
        rows_(rows) {}

  // Of so many negatives. All threads of the block; a barrier before. `late` is called by all when the
  // others need not wait for it any more: it may set *query_b, which is read at the end.
  template <class Late>
  __device__ void run(int64_t negatives, const double* query_b, const Late& late) {
    if (negatives == 0) late();
    if (works_) set_query();
    for (int64_t first = 0; first < negatives; first += kGradientThreads) {
      const int64_t left = negatives - first;
      const int count = static_cast<int>(left < kGradientThreads ? left : kGradientThreads);
      const bool all_fast = set_fast(first, count);
      if (first == 0) late();
      if (!works_) continue;
      if (all_fast) {
        fast_rows(first, count);
      } else {
        any_rows(first, count);
      }
    }
    if (works_ && class_ == kClasses - 1) positive();
    add_classes();
    if (works_ && class_ == 0) write_query(query_b);
    __syncthreads();
  }

 private:
  // Of a query that is not finite the live candidates' coefficients are NaN: 0 in its place leaves
  // those gradients NaN, and a masked row's 0.
  __device__ void set_query() {
    widen_all(rows_.read_query(), q_);
#pragma unroll
    for (int k = 0; k < kSize; ++k) q_[k] = isfinite(q_[k]) ? q_[k] : 0;
  }
  // Coefficients of some negatives as floats; whether those are enough for all.
  __device__ bool set_fast(int64_t first, int count) {
    const int own = static_cast<int>(threadIdx.x);
    if (first > 0) __syncthreads();
    bool slow = isnan(a_[0]);  // of a group that is not finite: what is not wanted may not be
    if (own < count) {
      fast_[own] = fast_coefficients(a_[1 + first + own], b_[1 + first + own], upstream_);
      slow = slow || isnan(fast_[own].x);
    }
    return __syncthreads_or(slow) == 0;
  }

  // The class's share of them, without a branch but at the end.
  __device__ void fast_rows(int64_t first, int count) {
    int next = class_;
#pragma unroll 1
    for (; next + (kTogether - 1) * kClasses < count; next += kTogether * kClasses) {
      together<true>(first, next, count);
    }
    if (next < count) together<false>(first, next, count);
  }
  template <bool kAll>
  __device__ void together(int64_t first, int next, int count) {
    float chain[kSize] = {};
#pragma unroll
    for (int part = 0; part < kTogether; part += kAhead) {
      Vector<T> rows[kAhead];
      float2 by[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int i = next + (part + j) * kClasses;
        if (!kAll && i >= count) continue;
        by[j] = fast_[i];
        rows[j] = rows_.read_negative(first + i, by[j].x != 0 || by[j].y != 0);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int i = next + (part + j) * kClasses;
        if (!kAll && i >= count) continue;
        float x[kSize];
        widen_all(rows[j], x);
        if (kNegatives) {
          float gradient[kSize];
          form(by[j], x, gradient);
          rows_.write_negative(first + i, gradient);
        }
#pragma unroll
        for (int k = 0; k < kSize; ++k) chain[k] = fmaf(by[j].x, x[k], chain[k]);
      }
    }
    add(chain);
  }

  // The same where some coefficients are out of the range of floats or not finite.
  __device__ void any_rows(int64_t first, int count) {
    for (int next = class_; next < count; next += kTogether * kClasses) {
      float chain[kSize] = {};
#pragma unroll 1
      for (int i = next; i < count && i < next + kTogether * kClasses; i += kClasses) {
        const auto write = [&](const auto* gradient) {
          if (kNegatives) rows_.write_negative(first + i, gradient);
        };
        float x[kSize] = {};
        if (fast_[i].x != 0 || fast_[i].y != 0) {
          widen_all(rows_.read_negative(first + i, true), x);
        }
        any_row(1 + first + i, fast_[i], x, chain, write);
      }
      add(chain);
    }
  }
  __device__ void positive() {
    float chain[kSize] = {}, x[kSize];
    widen_all(rows_.read_positive(), x);
    const auto write = [&](const auto* gradient) { rows_.write_positive(gradient); };
    any_row(0, fast_coefficients(a_[0], b_[0], upstream_), x, chain, write);
    add(chain);
  }
  template <class Write>
  __device__ void any_row(int64_t c, float2 by, const float* x, float* chain,
                          const Write& write) const {
    if (!isnan(by.x)) {
      float gradient[kSize];
      form(by, x, gradient);
      write(gradient);
#pragma unroll
      for (int k = 0; k < kSize; ++k) chain[k] = fmaf(by.x, x[k], chain[k]);
      return;
    }
    const double by_query = upstream_ * a_[c], by_row = upstream_ * b_[c];
    double gradient[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) gradient[k] = by_query * q_[k] + by_row * x[k];
    write(gradient);
#pragma unroll
    for (int k = 0; k < kSize; ++k) chain[k] += static_cast<float>(by_query * x[k]);
  }
  __device__ void form(float2 by, const float* x, float* gradient) const {
#pragma unroll
    for (int k = 0; k < kSize; ++k) gradient[k] = fmaf(by.x, q_[k], by.y * x[k]);
  }
  __device__ void add(const float* chain) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum_[k] += chain[k];
  }

  // (0 + 2) + (1 + 3).
  __device__ void add_classes() {
    for (int half = kClasses / 2; half > 0; half /= 2) {
      __syncthreads();
      float* const theirs = sums_ + (class_ % half * wide_ + at_);
      if (works_ && class_ >= half && class_ < 2 * half) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) theirs[k * 2 * wide_] = sum_[k];
      }
      __syncthreads();
      if (works_ && class_ < half) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) sum_[k] += theirs[k * 2 * wide_];
      }
    }
  }
  __device__ bool is_finite() const {
    bool finite = true;
#pragma unroll
    for (int k = 0; k < kSize; ++k) finite = finite && isfinite(sum_[k]);
    return finite;
  }
  // The sums, over `unit`, where a query of tiny norm has terms beyond the range of floats, which
  // their sum need not be.
  __device__ void sum_again(double unit) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum_[k] = 0;
#pragma unroll 1
    for (int64_t c = 0; c <= rows_.negatives(); ++c) {
      const double by_query = upstream_ * a_[c] / unit;
      if (by_query == 0) continue;  // masked, perhaps
      float x[kSize];
      widen_all(c == 0 ? rows_.read_positive() : rows_.read_negative(c - 1, true), x);
#pragma unroll
      for (int k = 0; k < kSize; ++k) sum_[k] += static_cast<float>(by_query * x[k]);
    }
  }
  // And the query's own share.
  __device__ void write_query(const double* query_b) {
    double unit = 1;
    if (!is_finite()) sum_again(unit = kUnit);
    const double by_query = upstream_ * *query_b;
    double gradient[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) gradient[k] = by_query * q_[k] + unit * sum_[k];
    rows_.write_query(gradient);
  }

  int wide_, at_, class_;
  bool works_;
  const double *a_, *b_;
  double upstream_;
  float2* fast_;
  float* sums_;
  const Rows& rows_;
  float q_[kSize] = {}, sum_[kSize] = {};
};

template <class Args>
__device__ inline float upstream_of(const Args& args, int64_t group) {
  if (args.upstream.data == nullptr) return 1;
  return *group_data<float>(args.batch, args.upstream, group);
}

}  // namespace elva
#endif  // ELVA_CUDA_REWARD_GRADIENT_H_
