// What: matrix products for the in-batch ops.
// Source: the dots of cosine (8) of elva_kernels.reference, and of its gradients; c = a b, or
//   c += a b.
// In: a [m, k] and b [k, n] of float or double, of bf16 both, or a of float with b of bf16, any
//   strides.
// Out: c [m, n] of float or double, dense rows.
// Work split: blocks of rows of c; b is packed by all threads, a block of a by the thread that
//   multiplies it. Small products by columns, each thread packing all that it multiplies.
// Bytes: b once a pass, from the third-level cache for each block of a.
// Numerics: by blocks of kDepth, each summed in an accumulator of its own and added to c in order:
//   an element's bits depend on its row of a and its column of b alone, whatever the sizes, the
//   place and the number of threads. That is why this is not a library's product: those choose
//   another kernel at an edge, or for another size, and then a copy of the positive does not tie
//   with it (measured with MKL: 2 different scores for 777 equal columns of length 64). Products of
//   bf16 are exact. Floats times bf16 are two products of halves, the second one left out of a
//   block where it cannot matter (ElvaMatrixArgs.allowed).
// Limits: k of 1 or more; bf16 wants a level with instructions for it (elva_multiplies_bf16).
// Reference: torch.mm.
#include <string.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "../elva_in_batch.h"
#include "arena.h"
#include "kernels.h"

namespace elva {
namespace {

// Ours: a panel of b in the first-level cache, a block of a in the second-level one; b in the
// third-level one as far as it goes.
constexpr int64_t kWordsOfB = int64_t{4} << 20;
constexpr int64_t kMostColumns = 4096;
// Up to here what threads pack for each other costs more to fetch than to pack again.
constexpr int64_t kFewWords = int64_t{1} << 20;
constexpr int64_t kPacking = 32;  // products in the time that packing an element takes
constexpr size_t kBlockBytes = size_t{1} << 20;  // from here on memory is worth keeping

int64_t rounded_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// How elements become words. `take` makes one of the elements at p and, if it lies within the
// depth, one stride on; `read` one of neighbours in memory.
template <class S>
struct Singles {
  using Word = S;
  static constexpr int64_t kElements = 1, kDepth = 192;
  static const MatrixTile<S, S>& tile(const MatrixKernels& kernels);
  static Word take(const S* p, int64_t, bool) { return *p; }
  static Word read(const S* p) { return *p; }
};
template <>
const MatrixTile<float, float>& Singles<float>::tile(const MatrixKernels& kernels) {
  return kernels.f32;
}
template <>
const MatrixTile<double, double>& Singles<double>::tile(const MatrixKernels& kernels) {
  return kernels.f64;
}
struct Pairs {
  using Word = Bf16Pair;
  static constexpr int64_t kElements = 2, kDepth = 256;
  static const MatrixTile<Bf16Pair, float>& tile(const MatrixKernels& kernels) {
    return kernels.bf16;
  }
  static Word take(const Bf16* p, int64_t stride, bool second) {
    const uint32_t high = second ? p[stride].bits : 0;
    return {p->bits | high << 16};
  }
  static Word read(const Bf16* p) {
    Word word;
    memcpy(&word, p, sizeof(word));
    return word;
  }
};

// Into the second-level cache.
template <class T>
void ask_for(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(p + i, 0, 2);
}

// Four dense rows side by side: stores far apart are what packing costs.
template <class F, class T>
void pack_four(const T* rows, int64_t row_stride, int64_t steps, int64_t width,
               typename F::Word* out) {
  const T *a = rows, *b = a + row_stride, *c = b + row_stride, *d = c + row_stride;
  int64_t s = 0;
#if defined(__SSE__)
  if constexpr (sizeof(typename F::Word) == sizeof(float)) {
    const auto load = [](const T* at) { return _mm_loadu_ps(reinterpret_cast<const float*>(at)); };
    for (; s + 4 <= steps; s += 4, out += 4 * width) {
      const int64_t i = s * F::kElements;
      __m128 words[] = {load(a + i), load(b + i), load(c + i), load(d + i)};
      _MM_TRANSPOSE4_PS(words[0], words[1], words[2], words[3]);
      for (int64_t step = 0; step < 4; ++step)
        _mm_storeu_ps(reinterpret_cast<float*>(out + step * width), words[step]);
    }
  }
#endif
  for (; s < steps; ++s, out += width) {
    const int64_t i = s * F::kElements;
    const typename F::Word words[] = {F::read(a + i), F::read(b + i), F::read(c + i),
                                      F::read(d + i)};
    memcpy(out, words, sizeof(words));
  }
}

// `count` rows of `depth` elements as panels of words, zero-padded: [width, steps] where kInRows,
// else [steps, width].
template <class F, bool kInRows, class T>
void pack(const T* rows, int64_t row_stride, int64_t stride, int64_t count, int64_t depth,
          int64_t width, int64_t steps, typename F::Word* out) {
  constexpr int64_t kElements = F::kElements;
  const int64_t whole = depth / kElements, filled = (depth + kElements - 1) / kElements;
  const auto place = [&](int64_t r, int64_t s) {
    return kInRows ? out + r * steps + s : out + s * width + r;
  };
  for (int64_t i = 0; i < count; i += width, out += steps * width) {
    const int64_t there = std::min(width, count - i);
    const T* from = rows + i * row_stride;
    if (there < width || filled < steps) std::fill(out, out + steps * width, typename F::Word{});
    if (stride == 1) {
      int64_t r = 0;
      for (; !kInRows && r + 4 <= there; r += 4)
        pack_four<F>(from + r * row_stride, row_stride, whole, width, out + r);
      for (; r < there; ++r) {
        const T* row = from + r * row_stride;
        for (int64_t s = 0; s < whole; ++s) *place(r, s) = F::read(row + s * kElements);
      }
    } else if (row_stride == 1) {
      for (int64_t s = 0; s < whole; ++s) {
        const T* at = from + s * kElements * stride;
        for (int64_t r = 0; r < there; ++r) *place(r, s) = F::take(at + r, stride, true);
      }
    } else {
      for (int64_t s = 0; s < whole; ++s) {
        const T* at = from + s * kElements * stride;
        for (int64_t r = 0; r < there; ++r)
          *place(r, s) = F::take(at + r * row_stride, stride, true);
      }
    }
    if (whole < filled) {
      const T* at = from + whole * kElements * stride;
      for (int64_t r = 0; r < there; ++r)
        *place(r, whole) = F::take(at + r * row_stride, stride, false);
    }
  }
}

// Memory of one product: kept for the next one where it is large.
template <class Word>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(Word));
    if (static_cast<size_t>(bytes) < kBlockBytes) {
      arena_.reset(static_cast<size_t>(bytes));
      data_ = arena_.take<Word>(count);
    } else {
      if (elva_acquire_block(bytes, &block_) != ELVA_OK) throw std::bad_alloc();
      data_ = static_cast<Word*>(block_.data);
    }
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (block_.data != nullptr) elva_release_block(&block_);
  }
  Word* data() const { return data_; }

 private:
  Arena arena_;
  ElvaBlock block_ = {};
  Word* data_;
};

// A: of a's elements; float beside Pairs is split in halves.
template <class F, class A, class B, class S>
class Product {
  using Word = typename F::Word;
  static constexpr int64_t kDepth = F::kDepth, kSteps = kDepth / F::kElements;
  static constexpr bool kHalves = std::is_same_v<Word, Bf16Pair> && std::is_same_v<A, float>;

 public:
  Product(const ElvaMatrixArgs& args, const MatrixKernels& kernels)
      : args_(args), kernels_(kernels), tile_(F::tile(kernels)) {
    if (!kHalves) return;
    lengths_.resize(static_cast<size_t>(args.k));
    std::transform(args.a_scale, args.a_scale + args.k, lengths_.begin(),
                   [](float scale) { return scale > 0 ? 1 / scale : 0.0f; });
  }

  ElvaStatus run() {
    const int64_t tail = args_.k % kDepth;
    const int64_t all_steps = args_.k / kDepth * kSteps + (tail > 0 ? steps(tail) : 0);
    if (args_.threads > 1 && (args_.m + args_.n) * all_steps <= kFewWords)
      return run_apart(all_steps);
    const int64_t most_columns = std::min(kMostColumns, rounded_up(args_.n, tile_.columns));
    const int64_t most_blocks = std::max<int64_t>(1, kWordsOfB / (most_columns * kSteps));
    const int64_t blocks = std::min(most_blocks, (args_.k - 1) / kDepth + 1);
    const Buffer<Word> b_panels(blocks * kSteps * most_columns);
    for (int64_t j = 0; j < args_.n; j += most_columns) {
      const int64_t columns = std::min(most_columns, args_.n - j);
      for (int64_t p = 0; p < args_.k; p += blocks * kDepth) {
        const int64_t depth = std::min(blocks * kDepth, args_.k - p);
        pack_b(p, depth, j, columns, b_panels.data());
        const ElvaStatus status = multiply(p, depth, j, columns, b_panels.data());
        if (status != ELVA_OK) return status;
      }
    }
    return ELVA_OK;
  }

 private:
  // One thread's memory.
  struct Panels {
    Word *high, *low;
    bool* low_matters;
    S* corner;
  };

  // Of blocks of `rows` rows of a.
  struct PanelSizes {
    int64_t words, tiles, corner;

    PanelSizes(int64_t rows, const MatrixTile<Word, S>& tile)
        : words(rounded_up(rows, tile.rows) * kSteps),
          tiles(words / kSteps / tile.rows),
          corner(tile.rows * tile.columns) {}
    size_t bytes() const {
      return 2 * Arena::bytes_for<Word>(words) + Arena::bytes_for<bool>(tiles) +
             Arena::bytes_for<S>(corner);
    }
    Panels take(Arena* arena) const {
      return {arena->take<Word>(words), arena->take<Word>(words), arena->take<bool>(tiles),
              arena->take<S>(corner)};
    }
  };

  const A* a(int64_t i, int64_t p) const {
    return static_cast<const A*>(args_.a) + i * args_.a_row_stride + p * args_.a_stride;
  }
  const B* b(int64_t p, int64_t j) const {
    return static_cast<const B*>(args_.b) + p * args_.b_row_stride + j * args_.b_stride;
  }
  S* c(int64_t i, int64_t j) const { return static_cast<S*>(args_.c) + i * args_.c_row_stride + j; }
  int64_t steps(int64_t depth) const {
    return rounded_up((depth + F::kElements - 1) / F::kElements, tile_.step_multiple);
  }

  // Blocks of kDepth one after the other, each [columns' panels, steps, tile's columns].
  void pack_b(int64_t p0, int64_t depth, int64_t j0, int64_t columns, Word* panels) const {
    const int64_t padded = rounded_up(columns, tile_.columns), tiles = padded / tile_.columns;
    const int64_t blocks = (depth - 1) / kDepth + 1;
    parallel_for(blocks * tiles, 8, args_.threads, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t p = item / tiles * kDepth, j = item % tiles * tile_.columns;
        const int64_t here = std::min(kDepth, depth - p);
        pack_tile(p0 + p, here, j0 + j, std::min(tile_.columns, columns - j),
                  panels + p / F::kElements * padded + j * steps(here));
      }
    });
  }

  void pack_tile(int64_t p, int64_t depth, int64_t j, int64_t columns, Word* panel) const {
    pack<F, false>(b(p, j), args_.b_stride, args_.b_row_stride, columns, depth, tile_.columns,
                   steps(depth), panel);
  }

  // The product in one piece a thread, which packs all that it multiplies.
  ElvaStatus run_apart(int64_t all_steps) const {
    const int64_t column_tiles = (args_.n - 1) / tile_.columns + 1;
    const int64_t row_tiles = (args_.m - 1) / tile_.rows + 1;
    int64_t column_parts = 1, width = 0, height = 0, least = std::numeric_limits<int64_t>::max();
    for (int64_t parts = 1; parts <= std::min<int64_t>(args_.threads, column_tiles); ++parts) {
      const int64_t columns = ((column_tiles - 1) / parts + 1) * tile_.columns;
      const int64_t rows = ((row_tiles - 1) / (args_.threads / parts) + 1) * tile_.rows;
      const int64_t cost = rows * columns + kPacking * (rows + columns);
      if (cost >= least) continue;
      least = cost;
      column_parts = parts, width = columns, height = rows;
    }
    const int64_t row_parts = (args_.m - 1) / height + 1;
    const int64_t words = all_steps * width;
    const PanelSizes sizes(std::min(kMostRows, height), tile_);
    const auto piece = [&](int64_t begin, int64_t end, Arena* arena) {
      Word* const panels = arena->take<Word>(words);
      const Panels mine = sizes.take(arena);
      if (tile_.begin != nullptr) tile_.begin();
      for (int64_t item = begin; item < end; ++item) {
        const int64_t j = item % column_parts * width, i = item / column_parts * height;
        part(i, std::min(i + height, args_.m), j, std::min(width, args_.n - j), panels, mine);
      }
      if (tile_.end != nullptr) tile_.end();
    };
    const size_t bytes = Arena::bytes_for<Word>(words) + sizes.bytes();
    return for_pieces(row_parts * column_parts, 1, args_.threads, bytes, piece);
  }

  // Rows [i, end) of some columns from j on, which may be none.
  void part(int64_t i, int64_t end, int64_t j, int64_t columns, Word* panels,
            const Panels& mine) const {
    if (i >= end || columns <= 0) return;
    const int64_t padded = rounded_up(columns, tile_.columns);
    for (int64_t p = 0; p < args_.k; p += kDepth) {
      const int64_t here = std::min(kDepth, args_.k - p);
      for (int64_t y = 0; y < columns; y += tile_.columns)
        pack_tile(p, here, j + y, std::min(tile_.columns, columns - y),
                  panels + p / F::kElements * padded + y * steps(here));
    }
    for (; i < end; i += kMostRows)
      block(0, args_.k, i, std::min(kMostRows, end - i), j, 0, columns, padded, panels, mine);
  }

  // Rows in equal blocks, a whole number of them a thread; columns are split where rows are few.
  ElvaStatus multiply(int64_t p0, int64_t depth, int64_t j0, int64_t columns,
                      const Word* b_panels) const {
    const int64_t threads = std::max(args_.threads, 1);
    const int64_t rounds = (args_.m - 1) / (threads * kMostRows) + 1;
    const int64_t even = (args_.m - 1) / (threads * rounds) + 1;
    const int64_t rows = std::min(kMostRows, rounded_up(even, tile_.rows));
    const int64_t row_blocks = (args_.m - 1) / rows + 1;
    const int64_t parts = row_blocks < threads ? 2 * threads / row_blocks : 1;
    const int64_t width = rounded_up((columns - 1) / parts + 1, tile_.columns);
    const int64_t column_blocks = (columns - 1) / width + 1;
    const PanelSizes sizes(rows, tile_);
    const auto piece = [&](int64_t begin, int64_t end, Arena* arena) {
      const Panels mine = sizes.take(arena);
      if (tile_.begin != nullptr) tile_.begin();
      for (int64_t item = begin; item < end; ++item) {
        const int64_t i = item / column_blocks * rows, j = item % column_blocks * width;
        block(p0, depth, i, std::min(rows, args_.m - i), j0, j, std::min(j + width, columns),
              rounded_up(columns, tile_.columns), b_panels, mine);
      }
      if (tile_.end != nullptr) tile_.end();
    };
    return for_pieces(row_blocks * column_blocks, 1, args_.threads, sizes.bytes(), piece);
  }

  // Rows [i, i + rows) of columns [j, end) of those packed, all of the packed depth.
  void block(int64_t p0, int64_t depth, int64_t i, int64_t rows, int64_t j0, int64_t j, int64_t end,
             int64_t padded, const Word* b_panels, const Panels& mine) const {
    for (int64_t p = 0; p < depth; p += kDepth) {
      const int64_t here = std::min(kDepth, depth - p);
      pack_a(i, rows, p0 + p, here, mine);
      const bool add = args_.add || p0 + p > 0;
      for (int64_t y = j; y < end; y += tile_.columns) {
        const Word* panel = b_panels + p / F::kElements * padded + y * steps(here);
        const int64_t words = tile_.columns * steps(here);
        const int64_t share = words / ((rows - 1) / tile_.rows + 1);
        for (int64_t x = 0; x < rows; x += tile_.rows) {
          ask_for(panel + words + x / tile_.rows * share, share);  // of the next panel
          const int64_t height = std::min(tile_.rows, rows - x);
          tile(panel, x, height, steps(here), std::min(tile_.columns, end - y), c(i + x, j0 + y),
               add, mine);
        }
      }
    }
  }

  void pack_a(int64_t i, int64_t rows, int64_t p, int64_t depth, const Panels& mine) const {
    if constexpr (kHalves) {
      // By Cauchy and Schwarz, over all blocks together.
      const double part = static_cast<double>(depth) / static_cast<double>(args_.k);
      const auto allowed = static_cast<float>(args_.allowed * args_.allowed * part);
      kernels_.halves({a(i, p), args_.a_row_stride, args_.a_stride, rows, depth, tile_.rows,
                       steps(depth), tile_.a_in_rows, args_.a_scale + p, lengths_.data() + p,
                       allowed, mine.high, mine.low, mine.low_matters});
    } else {
      const auto pack_rows = tile_.a_in_rows ? pack<F, true, A> : pack<F, false, A>;
      pack_rows(a(i, p), args_.a_row_stride, args_.a_stride, rows, depth, tile_.rows, steps(depth),
                mine.high);
    }
  }

  // One tile of c, whole or at an edge, from the packed rows [x, x + rows).
  void tile(const Word* panel, int64_t x, int64_t rows, int64_t steps, int64_t columns, S* c,
            bool add, const Panels& mine) const {
    const int64_t padded = rounded_up(rows, tile_.row_step);
    const bool whole = rows == padded && columns == tile_.columns;
    S* out = whole ? c : mine.corner;
    const int64_t stride = whole ? args_.c_row_stride : tile_.columns;
    tile_.multiply(mine.high + x * steps, panel, steps, out, stride, whole && add, padded);
    if (kHalves && mine.low_matters[x / tile_.rows])
      tile_.multiply(mine.low + x * steps, panel, steps, out, stride, true, padded);
    if (whole) return;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t n = 0; n < columns; ++n) {
        S* at = c + r * args_.c_row_stride + n;
        const S sum = mine.corner[r * tile_.columns + n];
        *at = add ? *at + sum : sum;
      }
    }
  }

  const ElvaMatrixArgs& args_;
  const MatrixKernels& kernels_;
  const MatrixTile<Word, S>& tile_;
  std::vector<float> lengths_;  // 1 / a_scale
};

ElvaStatus run(const ElvaMatrixArgs& args) {
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) return ELVA_BAD_LEVEL;
  if (args.m == 0 || args.n == 0) return ELVA_OK;  // an empty c
  const MatrixKernels& matrix = *kernels->matrix;
  if (args.b_dtype == ELVA_FP64) {
    return Product<Singles<double>, double, double, double>(args, matrix).run();
  }
  if (args.b_dtype == ELVA_FP32) {
    return Product<Singles<float>, float, float, float>(args, matrix).run();
  }
  if (args.b_dtype != ELVA_BF16) return ELVA_UNSUPPORTED;
  if (matrix.bf16.multiply == nullptr) return ELVA_BAD_LEVEL;
  if (args.a_dtype == ELVA_FP32) return Product<Pairs, float, Bf16, float>(args, matrix).run();
  if (args.a_dtype != ELVA_BF16) return ELVA_UNSUPPORTED;
  return Product<Pairs, Bf16, Bf16, float>(args, matrix).run();
}

}  // namespace
}  // namespace elva

extern "C" {

ElvaStatus elva_matrix_product_cpu(const ElvaMatrixArgs* args) {
  if (args->m == 0 || args->n == 0) return ELVA_OK;
  return elva::within_memory([args] { return elva::run(*args); });
}

bool elva_multiplies_bf16(void) {
  const elva::Kernels* kernels = elva::chosen_kernels();
  return kernels != nullptr && kernels->matrix->bf16.multiply != nullptr;
}

}  // extern "C"
