// What: topk: the k best corpus rows of each query by cosine or dot product, exact.
// Source: topk (15) of elva_kernels.reference.
// In: query [Q, D], corpus [P, D] in bf16, fp16, fp32 or fp64, any strides.
// Out: scores [Q, k] in fp32 (fp64), index int64 [Q, k].
// Work split: blocks of corpus rows over the threads; a block stays in the second-level cache while
//   all queries pass over it, four at a time in registers. A query's threshold decides nearly every
//   row by one comparison; the rest go into the thread's heap of k; the heaps are merged at the
//   end.
// Bytes: the corpus once (once more for each 256 MB of queries and heaps), which is the floor for
//   few queries; for many it is the dots' arithmetic.
// Numerics: see topk_simd.cpp and rescale.h. A score's bits depend on its row and query alone, and
//   the order is total, so the result does not depend on threads, blocks or other queries. A row
//   that is not finite scores -inf, and all rows do for a query that is not.
// Limits: k at most P.
// Reference: elva_kernels.reference.topk.
#include <math.h>

#include <algorithm>
#include <limits>

#include "../elva.h"
#include "arena.h"
#include "topk_lists.h"
#include "topk_queries.h"

namespace elva {
namespace {

constexpr int64_t kBlockBytes = 96
                                << 10;  // of rows: with four queries, well inside a level-2 cache
constexpr int64_t kBlockRows = 256;
// Below this many bytes a thread, waking one costs more than it brings (measured: about 10 us).
constexpr int64_t kBytesPerThread = 192 << 10;
constexpr int64_t kListBytes = 256 << 20;

template <class T>
int64_t block_rows(int64_t dim) {
  const int64_t fitting = kBlockBytes / (dim * static_cast<int64_t>(sizeof(T)));
  return std::min(kBlockRows, std::max(kScanRows, fitting / kScanRows * kScanRows));
}

// One thread's pass over some blocks, into its slot of the lists.
template <class T>
class Scanner {
 public:
  using V = typename ValueOf<T>::Type;

  static size_t arena_bytes(const ElvaTopkArgs& args) {
    const int64_t rows = block_rows<T>(args.dim);
    return Arena::bytes_for<const void*>(rows + kScanAhead) + Arena::bytes_for<const void*>(rows) +
           Arena::bytes_for<double>(kScanQueries * rows) + 2 * Arena::bytes_for<double>(rows) +
           Arena::bytes_for<T>(args.dim) +
           Arena::bytes_for<T>(args.corpus.stride == 1 ? 0 : rows * args.dim);
  }

  Scanner(const Kernels& kernels, const ElvaTopkArgs& args, const Queries<T>& queries,
          Lists<V>* lists, int64_t slot, Arena* arena)
      : scan_(kernels.scan[args.dtype]),
        args_(args),
        queries_(queries),
        lists_(lists),
        slot_(slot),
        rows_(arena->take<const void*>(block_rows<T>(args.dim) + kScanAhead)),
        next_(arena->take<const void*>(block_rows<T>(args.dim))),
        dots_(arena->take<double>(kScanQueries * block_rows<T>(args.dim))),
        norms_(arena->take<double>(block_rows<T>(args.dim))),
        inverses_(arena->take<double>(block_rows<T>(args.dim))),
        scaled_(arena->take<T>(args.dim)),
        packed_(args.corpus.stride == 1 ? nullptr
                                        : arena->take<T>(block_rows<T>(args.dim) * args.dim)) {}

  // Offers rows [first, first + count) to all queries.
  void block(int64_t first, int64_t count) {
    const int64_t whole = (count + kScanRows - 1) / kScanRows * kScanRows;
    find_rows(first, count, whole);
    find_next(first + whole, whole);
    ScanJob job{nullptr, 0, rows_, whole, args_.dim, dots_, norms_, next_, 0, 0};
    for (int64_t q = 0; q < queries_.count(); q += kScanQueries) {
      job.queries = queries_.pointers(q);
      job.query_count = static_cast<int32_t>(std::min(kScanQueries, queries_.count() - q));
      ask_for_part(q / kScanQueries, &job);
      scan_(job);
      if (job.square != nullptr) set_norms(count);
      job.square = nullptr;
      for (int64_t c = 0; c < job.query_count; ++c) pick(q + c, dots_ + c * whole, first, count);
    }
    for (int64_t r = 0; r < count; ++r) {
      if (std::isnan(inverses_[r])) offer_rescaled(first + r, static_cast<const T*>(rows_[r]));
    }
  }

 private:
  void find_rows(int64_t first, int64_t count, int64_t whole) {
    const T* corpus = static_cast<const T*>(args_.corpus.data);
    for (int64_t r = 0; r < whole + kScanAhead; ++r) {
      const int64_t row = packed_ == nullptr ? first + r : std::min(r, count - 1);
      if (packed_ == nullptr) {
        // A block that is not whole is the corpus's last: its last row fills it up.
        rows_[r] = corpus + std::min(row, args_.rows - 1) * args_.corpus.row_stride;
        continue;
      }
      rows_[r] = packed_ + row * args_.dim;
      if (r < count) {
        const T* data = corpus + (first + r) * args_.corpus.row_stride;
        pack(Row<T>{data, args_.corpus.stride}, args_.dim, packed_ + r * args_.dim);
      }
    }
  }

  // The block after this one, or the corpus's last row in its place.
  void find_next(int64_t first, int64_t count) {
    const T* corpus = static_cast<const T*>(args_.corpus.data);
    for (int64_t r = 0; r < count; ++r)
      next_[r] = corpus + std::min(first + r, args_.rows - 1) * args_.corpus.row_stride;
  }

  // The next block comes from memory while this one is computed: all jobs but the first, which
  // reads ahead by itself, ask for equal parts of its rows.
  void ask_for_part(int64_t tile, ScanJob* job) const {
    const int64_t parts = (queries_.count() - 1) / kScanQueries;
    if (tile == 0 || packed_ != nullptr) return;
    const int64_t lines = (args_.dim * static_cast<int64_t>(sizeof(T)) + 63) / 64;
    job->next_begin = (tile - 1) * lines / parts * 64;
    job->next_end = tile * lines / parts * 64;
  }

  // From the squares in norms_. The inverse of a row outside the fast path's range is NaN, which
  // reaches no threshold.
  void set_norms(int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      const bool ordinary = in_range<T>(norms_[r]);
      norms_[r] = queries_.cosine() ? std::sqrt(norms_[r]) : 1.0;
      inverses_[r] = ordinary ? 1 / norms_[r] : std::numeric_limits<double>::quiet_NaN();
    }
  }

  void pick(int64_t q, const double* dots, int64_t first, int64_t count) {
    if (!queries_.finite(q)) return;
    double least = queries_.least(q, lists_->threshold(slot_, q));
    for (int64_t r = 0; r < count; ++r) {
      if (!(dots[r] * inverses_[r] >= least)) continue;
      offer(q, queries_.score(q, dots[r], norms_[r], 0), first + r);
      least = queries_.least(q, lists_->threshold(slot_, q));
    }
  }

  void offer_rescaled(int64_t index, const T* row) {
    int exponent;
    const RowKind kind = inspect(Row<T>{row, 1}, args_.dim, &exponent);
    if (kind != RowKind::kFinite) {
      const bool zero = kind == RowKind::kZero;
      const V score = zero ? V{0} : -std::numeric_limits<V>::infinity();
      for (int64_t q = 0; q < queries_.count(); ++q) offer(q, score, index);
      return;
    }
    pack_scaled(Row<T>{row, 1}, args_.dim, exponent, scaled_);
    const void* copies[kScanRows + kScanAhead];
    std::fill(copies, copies + kScanRows + kScanAhead, scaled_);
    double dots[kScanQueries * kScanRows], squares[kScanRows];
    ScanJob job{nullptr, 0, copies, kScanRows, args_.dim, dots, squares, copies, 0, 0};
    for (int64_t q = 0; q < queries_.count(); q += kScanQueries) {
      job.queries = queries_.pointers(q);
      job.query_count = static_cast<int32_t>(std::min(kScanQueries, queries_.count() - q));
      scan_(job);
      job.square = nullptr;
      for (int64_t c = 0; c < job.query_count; ++c) {
        const double norm = std::sqrt(squares[0]);
        offer(q + c, queries_.score(q + c, dots[c * kScanRows], norm, exponent), index);
      }
    }
  }

  void offer(int64_t q, V score, int64_t index) {
    if (queries_.finite(q)) lists_->offer(slot_, q, {score, index});
  }

  const Scan scan_;
  const ElvaTopkArgs& args_;
  const Queries<T>& queries_;
  Lists<V>* const lists_;
  const int64_t slot_;
  const void** rows_;
  const void** next_;
  double* dots_;
  double* norms_;
  double* inverses_;
  T* scaled_;
  T* packed_;
};

// The results of queries [first, first + queries.count()).
template <class T, class V>
void write_results(const ElvaTopkArgs& args, const Queries<T>& queries, const Lists<V>& lists,
                   int64_t first, int64_t q, Hit<V>* buffer) {
  V* scores = static_cast<V*>(args.scores) + (first + q) * args.k;
  int64_t* index = args.index + (first + q) * args.k;
  if (queries.finite(q)) lists.merge(q, buffer);
  for (int64_t i = 0; i < args.k; ++i) {
    const Hit<V> none{-std::numeric_limits<V>::infinity(), i};
    const Hit<V>& hit = queries.finite(q) ? buffer[i] : none;
    scores[i] = hit.score;
    index[i] = hit.index;
  }
}

template <class T>
ElvaStatus run_chunk(const ElvaTopkArgs& args, const Kernels& kernels, int threads, int64_t first,
                     int64_t count) {
  using V = typename ValueOf<T>::Type;
  const Queries<T> queries(args, first, count);
  Lists<V> lists(threads, count, args.k);
  const int64_t height = block_rows<T>(args.dim);
  const auto scan = [&](int64_t begin, int64_t end, Arena* arena) {
    const int64_t slot = lists.acquire();
    Scanner<T> scanner(kernels, args, queries, &lists, slot, arena);
    for (int64_t i = begin; i < end; ++i)
      scanner.block(i * height, std::min(height, args.rows - i * height));
    lists.release(slot);
  };
  const ElvaStatus status = for_pieces((args.rows + height - 1) / height, 1, threads,
                                       Scanner<T>::arena_bytes(args), scan);
  if (status != ELVA_OK) return status;
  const auto write = [&](int64_t begin, int64_t end, Arena* arena) {
    Hit<V>* buffer = arena->take<Hit<V>>(threads * args.k);
    for (int64_t q = begin; q < end; ++q)
      write_results<T, V>(args, queries, lists, first, q, buffer);
  };
  const size_t bytes = Arena::bytes_for<Hit<V>>(threads * args.k);
  return for_pieces(count, 1, count * args.k < 4096 ? 1 : threads, bytes, write);
}

template <class T>
ElvaStatus run(const ElvaTopkArgs& args) {
  using V = typename ValueOf<T>::Type;
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) return ELVA_BAD_LEVEL;
  if (args.queries == 0 || args.k == 0) return ELVA_OK;
  const int64_t row_bytes = args.dim * static_cast<int64_t>(sizeof(T));
  const int64_t passes = (args.queries + kScanQueries - 1) / kScanQueries;
  const double work = static_cast<double>(args.rows) * static_cast<double>(row_bytes * passes);
  const int threads = static_cast<int>(
      std::min(static_cast<double>(std::max(1, args.threads)), 1 + work / kBytesPerThread));
  const int64_t bytes_each =
      static_cast<int64_t>(Queries<T>::bytes(1, args.dim) + Lists<V>::bytes(threads, 1, args.k));
  const int64_t chunk = std::max(kScanQueries, kListBytes / bytes_each);
  return within_memory([&] {
    ElvaStatus status = ELVA_OK;
    for (int64_t first = 0; first < args.queries && status == ELVA_OK; first += chunk) {
      const int64_t count = std::min(chunk, args.queries - first);
      status = run_chunk<T>(args, *kernels, threads, first, count);
    }
    return status;
  });
}

}  // namespace
}  // namespace elva

extern "C" ElvaStatus elva_topk_cpu(const ElvaTopkArgs* args) {
  return elva::by_dtype(args->dtype,
                        [args](auto element) { return elva::run<decltype(element)>(*args); });
}
