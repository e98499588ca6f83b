// What: matrix products for the in-batch ops.
// Source: the dots of cosine (8) of elva_kernels.reference, and of its gradients; c = a b, or
//   c += a b.
// In: a [m, k] and b [k, n] of float or double, of bf16 both, or a of float with b of bf16, any
//   strides.
// Out: c [m, n] of float or double, dense rows.
// Work split: blocks of rows of c; b is packed by all threads, a block of a by the thread that
//   multiplies it.
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
#include <type_traits>

#include "../elva_in_batch.h"
#include "arena.h"
#include "kernels.h"

namespace elva {
namespace {

// Ours: a panel of b in the first-level cache, a block of a in the second-level one; b in the
// third-level one as far as it goes.
constexpr int64_t kWordsOfB = int64_t{4} << 20;
constexpr int64_t kMostColumns = 4096;
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
  for (int64_t s = 0; s < steps; ++s, out += width) {
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
      : args_(args), kernels_(kernels), tile_(F::tile(kernels)) {}

  ElvaStatus run() {
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
        pack<F, false>(b(p0 + p, j0 + j), args_.b_stride, args_.b_row_stride,
                       std::min(tile_.columns, columns - j), here, tile_.columns, steps(here),
                       panels + p / F::kElements * padded + j * steps(here));
      }
    });
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
        const int64_t words = tile_.columns * steps(here), share = words * tile_.rows / rows;
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
                       steps(depth), tile_.a_in_rows, args_.a_scale + p, args_.a_norm + p, allowed,
                       mine.high, mine.low, mine.low_matters});
    } else {
      const auto pack_rows = tile_.a_in_rows ? pack<F, true, A> : pack<F, false, A>;
      pack_rows(a(i, p), args_.a_row_stride, args_.a_stride, rows, depth, tile_.rows, steps(depth),
                mine.high);
    }
  }

  // One tile of c, whole or at an edge, from the packed rows [x, x + rows).
  void tile(const Word* panel, int64_t x, int64_t rows, int64_t steps, int64_t columns, S* c,
            bool add, const Panels& mine) const {
    const bool whole = rows == tile_.rows && columns == tile_.columns;
    S* out = whole ? c : mine.corner;
    const int64_t stride = whole ? args_.c_row_stride : tile_.columns;
    tile_.multiply(mine.high + x * steps, panel, steps, out, stride, whole && add);
    if (kHalves && mine.low_matters[x / tile_.rows])
      tile_.multiply(mine.low + x * steps, panel, steps, out, stride, true);
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
