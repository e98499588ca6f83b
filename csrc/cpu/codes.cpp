// What: rows as 8-bit codes, and the rows whose codes allow the best cosines.
// Source: row_codes (16) and nearest_codes (17) of elva_kernels.reference.
// In: rows [count, dim] in bf16, fp16, fp32 or fp64, any strides; codes without gaps.
// Out: codes, scales, losses; bounds in fp32 and int64 rows of each query.
// Work split: rows over the threads; of a search, blocks of codes, which stay in the second-level
//   cache while all queries pass over them, four at a time in registers. A bound by the queries'
//   first bytes decides nearly every row; a row that passes gets one by both bytes, which goes into
//   the thread's heap; the heaps are merged at the end.
// Bytes: a search reads the codes once (once more for each 64 MB of queries and heaps), for many
//   queries it is bound by the products.
// Numerics: products are exact; a bound is never below a score of topk (SCORE_ERROR leaves room for
//   both roundings), and its bits may differ between levels.
// Limits: dim at most 65,536; depth at most the rows.
// Reference: elva_kernels.reference.row_codes, nearest_codes.
#include <math.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "../elva.h"
#include "arena.h"
#include "kernels.h"
#include "rescale.h"
#include "topk_lists.h"

namespace elva {
namespace {

constexpr float kLargestCode = 127;
constexpr double kRotationError = 4e-6;
constexpr float kScoreError = 1.2e-5F;
constexpr int64_t kBlockBytes = 96 << 10;  // of codes: well inside a level-2 cache
constexpr int64_t kBlockRows = 256;
constexpr int64_t kAhead = 8;  // rows asked for while a block's first queries read it
constexpr int64_t kBytesPerThread = 192 << 10;
constexpr int64_t kListBytes = 64 << 20;

// 1 or -1: `sign` of elva_kernels.reference.
float sign(int64_t turn, int64_t element) {
  uint32_t bits = static_cast<uint32_t>(2 * element + turn) * 0x9E3779B1U;
  bits = (bits ^ bits >> 15) * 0x85EBCA77U;
  return ((bits ^ bits >> 13) & 1U) == 0 ? 1.0F : -1.0F;
}

// The signs of both turns of a rotation: [2, dim].
void fill_signs(int64_t dim, float* signs) {
  for (int64_t turn = 0; turn < 2; ++turn) {
    for (int64_t i = 0; i < dim; ++i) signs[turn * dim + i] = sign(turn, i);
  }
}

class Coder {
 public:
  static size_t arena_bytes(int64_t dim) {
    return Arena::bytes_for<float>(dim) + Arena::bytes_for<double>(dim);
  }

  Coder(const CodeKernels& kernels, const ElvaRowCodesArgs& args, const float* signs, Arena* arena)
      : kernels_(kernels),
        args_(args),
        signs_(signs),
        row_(arena->take<float>(args.dim)),
        packed_(arena->take<double>(args.dim)) {}

  template <class T>
  void code(int64_t at) {
    const float largest = take(Row<T>{
        static_cast<const T*>(args_.rows.data) + at * args_.rows.row_stride, args_.rows.stride});
    int8_t* code = args_.code + at * args_.dim;
    int8_t* fine = args_.fine == nullptr ? nullptr : args_.fine + at * args_.dim;
    if (largest == 0 || !std::isfinite(largest)) {
      std::fill(code, code + args_.dim, int8_t{0});
      if (fine != nullptr) std::fill(fine, fine + args_.dim, int8_t{0});
      args_.scale[at] = 0;
      args_.lost[at] = largest == 0 ? 0 : std::numeric_limits<float>::infinity();
      return;
    }
    const PowerOfTwo power(-std::ilogb(largest));
    for (int64_t i = 0; i < args_.dim; ++i) row_[i] = static_cast<float>(power(row_[i]));
    const float inverse = static_cast<float>(1 / std::sqrt(kernels_.square(row_, args_.dim)));
    for (int64_t i = 0; i < args_.dim; ++i) row_[i] *= inverse;
    rotate();
    float most = 0;
    for (int64_t i = 0; i < args_.dim; ++i) most = std::max(most, std::fabs(row_[i]));
    const float scale = most / kLargestCode;
    const double left = kernels_.round(row_, args_.dim, 1 / scale, code, fine);
    args_.scale[at] = scale;
    args_.lost[at] = static_cast<float>(left * scale * (1 + 1e-5) + kRotationError);
  }

 private:
  // Into row_, by a power of two where floats do not have the range; the largest magnitude.
  template <class T>
  float take(Row<T> row) {
    T* packed = reinterpret_cast<T*>(packed_);
    const T* data = row.data;
    if (row.stride != 1) {
      pack(row, args_.dim, packed);
      data = packed;
    }
    if constexpr (!std::is_same_v<T, double>) {
      return kernels_.widen[args_.dtype](data, args_.dim, row_);
    } else {
      int exponent;
      const RowKind kind = inspect(Row<T>{data, 1}, args_.dim, &exponent);
      if (kind == RowKind::kNotFinite) return std::numeric_limits<float>::infinity();
      const PowerOfTwo power(-exponent);
      for (int64_t i = 0; i < args_.dim; ++i) row_[i] = static_cast<float>(power(data[i]));
      return kind == RowKind::kZero ? 0 : 1;
    }
  }

  void rotate() {
    int64_t size = 1;
    while (2 * size <= args_.dim) size *= 2;
    for (int64_t turn = 0; turn < 2; ++turn) {
      const float* signs = signs_ + turn * args_.dim;
      for (int64_t i = 0; i < args_.dim; ++i) row_[i] *= signs[i];
      kernels_.mix(row_ + (turn == 0 ? 0 : args_.dim - size), size);
    }
  }

  const CodeKernels& kernels_;
  const ElvaRowCodesArgs& args_;
  const float* const signs_;
  float* row_;
  double* packed_;
};

template <class T>
ElvaStatus code_rows(const ElvaRowCodesArgs& args) {
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) return ELVA_BAD_LEVEL;
  return within_memory([&] {
    Arena shared;
    shared.reset(Arena::bytes_for<float>(2 * args.dim));
    float* signs = shared.take<float>(2 * args.dim);
    fill_signs(args.dim, signs);
    const int64_t grain = std::max<int64_t>(1, kBytesPerThread / (args.dim * 8));
    return for_pieces(args.count, grain, args.threads, Coder::arena_bytes(args.dim),
                      [&](int64_t begin, int64_t end, Arena* arena) {
                        Coder coder(*kernels->codes, args, signs, arena);
                        for (int64_t at = begin; at < end; ++at) coder.code<T>(at);
                      });
  });
}

// Queries as the inner loop reads them: both bytes padded by zeros.
class CodedQueries {
 public:
  static int64_t padded_dim(int64_t dim) {
    return (dim + kCodePadding - 1) / kCodePadding * kCodePadding;
  }
  static size_t bytes(int64_t count, int64_t dim) {
    return 2 * (Arena::bytes_for<int8_t>(count * padded_dim(dim)) +
                Arena::bytes_for<const int8_t*>(count) + Arena::bytes_for<int32_t>(count)) +
           3 * Arena::bytes_for<float>(count);
  }

  // Queries [first, first + count). Throws std::bad_alloc.
  CodedQueries(const CodeKernels& kernels, const ElvaNearestCodesArgs& args, int64_t first,
               int64_t count)
      : count_(count), least_(args.floor == nullptr ? nullptr : args.floor + first) {
    memory_.reset(bytes(count, args.dim));
    code_ = planes(kernels, args.query_code + first * args.dim, args.dim, &surplus_);
    fine_ = planes(kernels, args.query_fine + first * args.dim, args.dim, &fine_surplus_);
    gain_ = memory_.take<float>(count);
    missed_ = memory_.take<float>(count);
    fine_missed_ = memory_.take<float>(count);
    for (int64_t q = 0; q < count; ++q) {
      const int8_t* fine = fine_[q];
      double square = 0;
      for (int64_t i = 0; i < args.dim; ++i) square += fine[i] * fine[i];
      const float scale = args.query_scale[first + q], lost = args.query_lost[first + q];
      gain_[q] = scale;
      fine_missed_[q] = lost + kScoreError;
      missed_[q] =
          static_cast<float>(std::sqrt(square) / kFineSteps * scale * (1 + 1e-6)) + fine_missed_[q];
    }
  }

  int64_t count() const { return count_; }
  const int8_t* const* codes() const { return code_; }
  const int32_t* surplus() const { return surplus_; }
  const float* gain() const { return gain_; }
  const float* missed() const { return missed_; }

  // Lower bounds of query q are not looked for.
  float least(int64_t q) const {
    return least_ == nullptr ? -std::numeric_limits<float>::infinity() : least_[q];
  }

  // The bound by both bytes, from the product of the first ones.
  float bound(const CodeKernels& kernels, int64_t q, int32_t dot, const int8_t* row, int64_t dim,
              float scale, float lost) const {
    const double fine = kernels.dot(fine_[q], fine_surplus_[q], row, dim);
    const double near = (dot + fine / kFineSteps) * gain_[q] * scale;
    return static_cast<float>(near + fine_missed_[q] * (1.0 + lost) + lost);
  }

 private:
  const int8_t** planes(const CodeKernels& kernels, const int8_t* codes, int64_t dim,
                        int32_t** surplus) {
    const int64_t padded = padded_dim(dim);
    int8_t* packed = memory_.take<int8_t>(count_ * padded);
    const int8_t** pointers = memory_.take<const int8_t*>(count_);
    *surplus = memory_.take<int32_t>(count_);
    for (int64_t q = 0; q < count_; ++q) {
      int8_t* out = packed + q * padded;
      std::copy(codes + q * dim, codes + (q + 1) * dim, out);
      std::fill(out + dim, out + padded, int8_t{0});
      pointers[q] = out;
      (*surplus)[q] = kernels.surplus(out, dim);
    }
    return pointers;
  }

  const int64_t count_;
  const float* const least_;
  Arena memory_;
  const int8_t **code_, **fine_;
  int32_t *surplus_, *fine_surplus_;
  float *gain_, *missed_, *fine_missed_;
};

int64_t block_rows(int64_t dim) {
  return std::min(kBlockRows, std::max<int64_t>(4, kBlockBytes / dim / 4 * 4));
}

// One thread's pass over some blocks, into its slot of the lists.
class CodeScanner {
 public:
  static size_t arena_bytes(int64_t dim) {
    return Arena::bytes_for<int32_t>(kCodeQueries * block_rows(dim)) +
           Arena::bytes_for<float>(kCodeQueries * block_rows(dim));
  }

  CodeScanner(const CodeKernels& kernels, const ElvaNearestCodesArgs& args,
              const CodedQueries& queries, Lists<float>* lists, int64_t slot, Arena* arena)
      : kernels_(kernels),
        args_(args),
        queries_(queries),
        lists_(lists),
        slot_(slot),
        dot_(arena->take<int32_t>(kCodeQueries * block_rows(args.dim))),
        bound_(arena->take<float>(kCodeQueries * block_rows(args.dim))) {}

  // Offers rows [first, first + count) to all queries.
  void block(int64_t first, int64_t count) {
    float largest[kCodeQueries];
    CodeJob job = {};
    job.rows = args_.code + first * args_.dim;
    job.count = count;
    job.dim = args_.dim;
    job.scale = args_.scale + first;
    job.lost = args_.lost + first;
    job.dot = dot_;
    job.bound = bound_;
    job.largest = largest;
    for (int64_t q = 0; q < queries_.count(); q += kCodeQueries) {
      job.queries = queries_.codes() + q;
      job.query_count = static_cast<int32_t>(std::min(kCodeQueries, queries_.count() - q));
      job.surplus = queries_.surplus() + q;
      job.gain = queries_.gain() + q;
      job.missed = queries_.missed() + q;
      job.ahead = q == 0 ? kAhead : 0;
      kernels_.scan(job);
      for (int64_t c = 0; c < job.query_count; ++c) {
        if (largest[c] >= least(q + c)) pick(q + c, c * count, first, count);
      }
    }
  }

 private:
  float least(int64_t q) const { return std::max(queries_.least(q), lists_->threshold(slot_, q)); }

  void pick(int64_t q, int64_t offset, int64_t first, int64_t count) {
    float wanted = least(q);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = first + r;
      if (!(bound_[offset + r] >= wanted)) continue;
      if (args_.mask != nullptr && args_.mask[at] == 0) continue;
      const float bound = queries_.bound(kernels_, q, dot_[offset + r], args_.code + at * args_.dim,
                                         args_.dim, args_.scale[at], args_.lost[at]);
      if (!(bound >= wanted)) continue;
      lists_->offer(slot_, q, {bound, at});
      wanted = least(q);
    }
  }

  const CodeKernels& kernels_;
  const ElvaNearestCodesArgs& args_;
  const CodedQueries& queries_;
  Lists<float>* const lists_;
  const int64_t slot_;
  int32_t* dot_;
  float* bound_;
};

ElvaStatus search_chunk(const ElvaNearestCodesArgs& args, const CodeKernels& kernels, int threads,
                        int64_t first, int64_t count) {
  const CodedQueries queries(kernels, args, first, count);
  Lists<float> lists(threads, count, args.depth);
  const int64_t height = block_rows(args.dim);
  const auto scan = [&](int64_t begin, int64_t end, Arena* arena) {
    const int64_t slot = lists.acquire();
    CodeScanner scanner(kernels, args, queries, &lists, slot, arena);
    for (int64_t i = begin; i < end; ++i)
      scanner.block(i * height, std::min(height, args.rows - i * height));
    lists.release(slot);
  };
  const ElvaStatus status = for_pieces((args.rows + height - 1) / height, 1, threads,
                                       CodeScanner::arena_bytes(args.dim), scan);
  if (status != ELVA_OK) return status;
  const auto write = [&](int64_t begin, int64_t end, Arena* arena) {
    Hit<float>* buffer = arena->take<Hit<float>>(threads * args.depth);
    for (int64_t q = begin; q < end; ++q) {
      const int64_t found = std::min(args.depth, lists.merge(q, buffer));
      float* bounds = args.bounds + (first + q) * args.depth;
      int64_t* index = args.index + (first + q) * args.depth;
      for (int64_t i = 0; i < args.depth; ++i) {
        bounds[i] = i < found ? buffer[i].score : -std::numeric_limits<float>::infinity();
        index[i] = i < found ? buffer[i].index : -1;
      }
    }
  };
  const size_t bytes = Arena::bytes_for<Hit<float>>(threads * args.depth);
  return for_pieces(count, 1, count * args.depth < 4096 ? 1 : threads, bytes, write);
}

ElvaStatus search(const ElvaNearestCodesArgs& args) {
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) return ELVA_BAD_LEVEL;
  if (args.queries == 0 || args.depth == 0) return ELVA_OK;
  const int64_t passes = (args.queries + kCodeQueries - 1) / kCodeQueries;
  const double work = static_cast<double>(args.rows) * static_cast<double>(args.dim * passes);
  const int threads = static_cast<int>(
      std::min(static_cast<double>(std::max(1, args.threads)), 1 + work / kBytesPerThread));
  const int64_t bytes_each = static_cast<int64_t>(CodedQueries::bytes(1, args.dim) +
                                                  Lists<float>::bytes(threads, 1, args.depth));
  const int64_t chunk = std::max(kCodeQueries, kListBytes / bytes_each);
  return within_memory([&] {
    ElvaStatus status = ELVA_OK;
    for (int64_t first = 0; first < args.queries && status == ELVA_OK; first += chunk) {
      const int64_t count = std::min(chunk, args.queries - first);
      status = search_chunk(args, *kernels->codes, threads, first, count);
    }
    return status;
  });
}

}  // namespace
}  // namespace elva

extern "C" ElvaStatus elva_row_codes_cpu(const ElvaRowCodesArgs* args) {
  return elva::by_dtype(args->dtype,
                        [args](auto element) { return elva::code_rows<decltype(element)>(*args); });
}

extern "C" ElvaStatus elva_nearest_codes_cpu(const ElvaNearestCodesArgs* args) {
  return elva::search(*args);
}
