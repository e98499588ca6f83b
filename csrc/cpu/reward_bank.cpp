// What: the gradient of a bank of negatives, of which an index names each group's: a row's sum over
//   its places in the index.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; the derivative of cosine (1) of
//   elva_kernels.reference by a candidate.
// In: query [*, D], bank [M, D] in bf16, fp16, fp32 or fp64, any strides; coefficients of the
//   forward; the places in the index sorted by row, and where each row's begin.
// Out: gradient [M, D] dense, in the inputs' dtype; 0 for a row without a place.
// Work split: rows over threads; a row's queries 8 at a time.
// Bytes: each named row and each place's query read once, each row of the gradient written once,
//   past the caches where they could not hold it.
// Numerics: sum over places of a q' in float by 8 and then in double, of b in double; scaled by 2^-e
//   and rounded once at the end. Deterministic: a row's bits depend on its places alone.
// Limits: 8 leading dimensions that do not merge.
// Reference: elva_kernels.reference.ranking_reward with an index, by autograd.
#include <algorithm>

#include "arena.h"
#include "coefficients.h"
#include "kernels.h"
#include "rescale.h"
#include "row_layout.h"

namespace elva {
namespace {

constexpr int64_t kStreamBytes = 4 << 20;
constexpr int64_t kGrainBytes = 64 << 10;
// Places of a row that are summed at a time, and where their queries have to be packed: multiples of
// the 8 that the kernel adds in float.
constexpr int64_t kPlaces = 128, kPackedPlaces = 8;

template <class T>
class BankRows {
 public:
  using V = typename ValueOf<T>::Type;

  static size_t arena_bytes(int64_t dim) {
    return Arena::bytes_for<double>(dim + kPadding) +
           Arena::bytes_for<T>(dim) * (kPackedPlaces + 1) + Arena::bytes_for<V>(kPlaces) * 2 +
           Arena::bytes_for<void*>(kPlaces);
  }

  BankRows(const Kernels& kernels, const ElvaBankGradientArgs& args, Arena* arena)
      : kernels_(kernels), args_(args), dim_(args.dim) {
    sum_ = arena->take<double>(dim_ + kPadding);
    packed_row_ = arena->take<T>(dim_);
    for (T*& packed : packed_) packed = arena->take<T>(dim_);
    a_ = arena->take<V>(kPlaces);
    b_ = arena->take<V>(kPlaces);
    queries_ = arena->take<const void*>(kPlaces);
    const int64_t row_bytes = dim_ * static_cast<int64_t>(sizeof(T));
    stream_ = row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(args.grad_negative) % 64 == 0 &&
              args.bank_rows * row_bytes > kStreamBytes;
  }

  void gradients(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
      const int64_t named = next_named(row, end);
      T* out = static_cast<T*>(args_.grad_negative);
      memset(out + row * dim_, 0, static_cast<size_t>((named - row) * dim_) * sizeof(T));
      if (named == end) return;
      row = named + 1;
      const int64_t next = next_named(row, end);
      gradient(named, next == end ? named : next, out + named * dim_);
    }
  }

 private:
  // A place in the index: what it adds to its row's gradient.
  struct Place {
    Row<T> query;
    double a, b;                    // times upstream
    bool is_none;                   // adds nothing
    bool row_is_far, query_is_far;  // out of the fast path's range
  };

  int64_t next_named(int64_t row, int64_t end) const {
    while (row < end && args_.first[row] == args_.first[row + 1]) ++row;
    return row;
  }

  Place place(int64_t i) const {
    const int64_t group = args_.order[i] / args_.negatives;
    const int64_t candidate = args_.order[i] % args_.negatives + 1;
    const int64_t candidates = args_.negatives + 1;
    const double* coefficients = args_.coefficients + group * (2 * candidates + 1);
    const double a = coefficients[candidate], b = coefficients[candidates + candidate];
    const GroupIndex index(args_.batch, group);
    const V* upstream = group_data<V>(args_.batch, args_.upstream, index);
    const double factor = upstream == nullptr ? 1.0 : static_cast<double>(*upstream);
    const Row<T> query{group_data<T>(args_.batch, args_.query, index), args_.query.stride};
    return {query,        factor * a,
            factor * b,   a == 0 && b == 0,
            is_marked(a), is_marked(coefficients[2 * candidates])};
  }

  Row<T> bank_row(int64_t row) const {
    return {static_cast<const T*>(args_.negative.data) + row * args_.negative.row_stride,
            args_.negative.stride};
  }

  // `ahead`: the row that is read next.
  void gradient(int64_t row, int64_t ahead, T* out) {
    const int64_t begin = args_.first[row], end = args_.first[row + 1];
    int64_t count = 0;
    bool careful = false;
    double b = 0;
    for (int64_t i = begin; i < end; ++i) {
      const Place p = place(i);
      if (p.is_none) continue;
      careful = careful || p.row_is_far || p.query_is_far || !moderate(p.a) || !moderate(p.b);
      b += p.b;
      ++count;
    }
    if (count == 0) {
      memset(out, 0, static_cast<size_t>(dim_) * sizeof(T));
    } else if (careful || !moderate(b)) {
      careful_gradient(bank_row(row), begin, end, out);
    } else {
      fast_gradient(row, ahead, begin, end, count == 1, b, out);
    }
  }

  void fast_gradient(int64_t row, int64_t ahead, int64_t begin, int64_t end, bool once, double b,
                     T* out) {
    const void* source = dense(bank_row(row), packed_row_);
    if (!once) std::fill(sum_, sum_ + dim_ + kPadding, 0.0);
    const int64_t most = args_.query.stride == 1 ? kPlaces : kPackedPlaces;
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i) {
      const Place p = place(i);
      if (!p.is_none) {
        a_[count] = static_cast<V>(p.a);
        queries_[count] = dense(p.query, packed_[count % kPackedPlaces]);
        ++count;
      }
      if (!once && (count == most || i + 1 == end)) {
        kernels_.gradients[args_.dtype](
            {nullptr, queries_, nullptr, a_, nullptr, count, dim_, sum_, false, nullptr});
        count = 0;
      }
    }
    if (!once) {
      kernels_.query_gradient[args_.dtype]({source, sum_, b, dim_, out, stream_});
      return;
    }
    b_[0] = static_cast<V>(b);
    void* outs[] = {out};
    const void* next[] = {bank_row(ahead).data};
    kernels_.gradients[args_.dtype]({queries_[0], &source, outs, a_, b_, 1, dim_, nullptr, stream_,
                                     args_.negative.stride == 1 ? next : nullptr});
  }

  const T* dense(Row<T> row, T* packed) const {
    if (dim_ <= 1 || row.stride == 1) return row.data;
    pack(row, dim_, packed);
    return packed;
  }

  // In double, for rows, queries and coefficients of any magnitude, NaN included.
  void careful_gradient(Row<T> row, int64_t begin, int64_t end, T* out) {
    std::fill(sum_, sum_ + dim_, 0.0);
    double b = 0;
    bool row_is_far = false;
    for (int64_t i = begin; i < end; ++i) {
      const Place p = place(i);
      if (p.is_none) continue;
      b += p.b;
      row_is_far = row_is_far || p.row_is_far;
      const PowerOfTwo down(-(p.query_is_far ? scale_exponent(p.query, dim_) : 0));
      for (int64_t k = 0; k < dim_; ++k) sum_[k] += p.a * down(to_double(p.query[k]));
    }
    const PowerOfTwo scale(-(row_is_far ? scale_exponent(row, dim_) : 0));
    for (int64_t k = 0; k < dim_; ++k) {
      from_double(scale(sum_[k] + b * scale(to_double(row[k]))), out + k);
    }
  }

  const Kernels& kernels_;
  const ElvaBankGradientArgs& args_;
  const int64_t dim_;
  bool stream_;
  double* sum_;
  T* packed_row_;
  T* packed_[kPackedPlaces];
  V *a_, *b_;
  const void** queries_;
};

template <class T>
ElvaStatus bank_gradient(const ElvaBankGradientArgs& args) {
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) return ELVA_BAD_LEVEL;
  const int64_t row_bytes = args.dim * static_cast<int64_t>(sizeof(T));
  const auto piece = [&](int64_t begin, int64_t end, Arena* arena) {
    BankRows<T>(*kernels, args, arena).gradients(begin, end);
  };
  return for_pieces(args.bank_rows, std::max<int64_t>(1, kGrainBytes / row_bytes), args.threads,
                    BankRows<T>::arena_bytes(args.dim), piece);
}

}  // namespace
}  // namespace elva

extern "C" {

ElvaStatus elva_bank_gradient_cpu(const ElvaBankGradientArgs* args) {
  return elva::by_dtype(
      args->dtype, [args](auto element) { return elva::bank_gradient<decltype(element)>(*args); });
}

}  // extern "C"
