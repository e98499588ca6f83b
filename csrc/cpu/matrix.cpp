// What: matrix products for the in-batch ops. In: a [m, k] and b [k, n] of float or double, any
// strides. Out: c [m, n], c = a b or c += a b. Work split: blocks of c; b is packed once a block of
// columns and depth, by all threads, a by the thread that multiplies it. Bytes: a block of b stays
// in the second-level or third-level cache for all of a. Numerics: by blocks of kDepth, each summed
// in an accumulator of its own and added to c in order: an element's bits depend on its row of a
// and its column of b alone, whatever the sizes, the place and the number of threads. That is why
// this is not a library's product: those choose another kernel at an edge, or for another size, and
// then a copy of the positive does not tie with it (measured with MKL: 2 different scores for 777
// equal columns of length 64). Limits: none. Reference: torch.mm.
#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "layout.h"
#include "parallel.h"

namespace elva {
namespace {

// Ours: a panel of b in the first-level cache, a block of a in the second-level one.
constexpr int64_t kDepth = 192;
constexpr int64_t kRows = 192;
constexpr int64_t kColumns = 512;
constexpr int64_t kPackedColumns = 4096;

int64_t rounded_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// `count` rows of `depth` elements as panels [depth, width], zero-padded.
template <class S>
void pack(const S* rows, int64_t row_stride, int64_t stride, int64_t count, int64_t depth,
          int64_t width, S* out) {
  for (int64_t i = 0; i < count; i += width) {
    const int64_t there = std::min(width, count - i);
    const S* from = rows + i * row_stride;
    if (stride == 1) {
      for (int64_t r = 0; r < there; ++r) {
        for (int64_t p = 0; p < depth; ++p) out[p * width + r] = from[r * row_stride + p];
      }
    } else {
      for (int64_t p = 0; p < depth; ++p) {
        for (int64_t r = 0; r < there; ++r) out[p * width + r] = from[r * row_stride + p * stride];
      }
    }
    for (int64_t r = there; r < width; ++r) {
      for (int64_t p = 0; p < depth; ++p) out[p * width + r] = 0;
    }
    out += depth * width;
  }
}

template <class S>
struct Product {
  const ElvaMatrixArgs& args;
  const MatrixTile<S>& tile;

  const S* a(int64_t i, int64_t p) const {
    return static_cast<const S*>(args.a) + i * args.a_row_stride + p * args.a_stride;
  }
  const S* b(int64_t p, int64_t j) const {
    return static_cast<const S*>(args.b) + p * args.b_row_stride + j * args.b_stride;
  }
  S* c(int64_t i, int64_t j) const { return static_cast<S*>(args.c) + i * args.c_row_stride + j; }

  // Rows [i, i + rows) and columns [j, j + columns) of c, with packed a and b.
  void block(int64_t i, int64_t rows, int64_t j, int64_t columns, int64_t depth, const S* a_panels,
             const S* b_panels, bool add, S* corner) const {
    for (int64_t y = 0; y < columns; y += tile.columns) {
      const S* b_panel = b_panels + y * depth;
      for (int64_t x = 0; x < rows; x += tile.rows) {
        const S* a_panel = a_panels + x * depth;
        if (x + tile.rows <= rows && y + tile.columns <= columns) {
          tile.multiply(a_panel, b_panel, depth, c(i + x, j + y), args.c_row_stride, add);
        } else {
          edge(a_panel, b_panel, depth, i + x, std::min(tile.rows, rows - x), j + y,
               std::min(tile.columns, columns - y), add, corner);
        }
      }
    }
  }

  void edge(const S* a_panel, const S* b_panel, int64_t depth, int64_t i, int64_t rows, int64_t j,
            int64_t columns, bool add, S* corner) const {
    tile.multiply(a_panel, b_panel, depth, corner, tile.columns, false);
    for (int64_t x = 0; x < rows; ++x) {
      for (int64_t y = 0; y < columns; ++y) {
        S* at = c(i + x, j + y);
        const S sum = corner[x * tile.columns + y];
        *at = add ? *at + sum : sum;
      }
    }
  }
};

template <class S>
ElvaStatus run(const ElvaMatrixArgs& args) {
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) return ELVA_BAD_LEVEL;
  const Product<S> product{args, row_kernels<S>(*kernels->batch).tile};
  const MatrixTile<S>& tile = product.tile;
  const int64_t packed = std::min(kPackedColumns, rounded_up(args.n, tile.columns));
  Arena shared;
  shared.reset(Arena::bytes_for<S>(kDepth * packed));
  S* b_panels = shared.take<S>(kDepth * packed);
  const int64_t a_size = rounded_up(std::min(kRows, args.m), tile.rows) * kDepth;
  const int64_t corner_size = tile.rows * tile.columns;
  std::atomic<bool> out_of_memory{false};
  for (int64_t j0 = 0; j0 < args.n; j0 += packed) {
    const int64_t columns = std::min(packed, args.n - j0);
    for (int64_t p0 = 0; p0 < args.k; p0 += kDepth) {
      const int64_t depth = std::min(kDepth, args.k - p0);
      parallel_for((columns - 1) / tile.columns + 1, 8, args.threads,
                   [&](int64_t begin, int64_t end) {
                     const int64_t j = begin * tile.columns;
                     const int64_t count = std::min(end * tile.columns, columns) - j;
                     pack(product.b(p0, j0 + j), args.b_stride, args.b_row_stride, count, depth,
                          tile.columns, b_panels + j * depth);
                   });
      const int64_t column_blocks = (columns - 1) / kColumns + 1;
      const int64_t row_blocks = (args.m - 1) / kRows + 1;
      parallel_for(row_blocks * column_blocks, 1, args.threads, [&](int64_t begin, int64_t end) {
        Arena& arena = thread_arena();
        try {
          arena.reset(Arena::bytes_for<S>(a_size) + Arena::bytes_for<S>(corner_size));
        } catch (const std::bad_alloc&) {
          out_of_memory = true;
          return;
        }
        S* a_panels = arena.take<S>(a_size);
        S* corner = arena.take<S>(corner_size);
        int64_t packed_rows = -1;
        for (int64_t item = begin; item < end; ++item) {
          const int64_t i = item / column_blocks * kRows, j = item % column_blocks * kColumns;
          const int64_t rows = std::min(kRows, args.m - i);
          if (i != packed_rows) {
            pack(product.a(i, p0), args.a_row_stride, args.a_stride, rows, depth, tile.rows,
                 a_panels);
            packed_rows = i;
          }
          product.block(i, rows, j0 + j, std::min(kColumns, columns - j), depth, a_panels,
                        b_panels + j * depth, args.add || p0 > 0, corner);
        }
      });
      if (out_of_memory) return ELVA_OUT_OF_MEMORY;
    }
  }
  return ELVA_OK;
}

}  // namespace
}  // namespace elva

extern "C" ElvaStatus elva_matrix_product_cpu(const ElvaMatrixArgs* args) {
  try {
    return args->dtype == ELVA_FP64 ? elva::run<double>(*args) : elva::run<float>(*args);
  } catch (const std::bad_alloc&) {
    return ELVA_OUT_OF_MEMORY;
  }
}
