// What: products of matrices in fp32, for the in-batch ops of fp32 rows: scores, and slopes times
//   rows; torch's would depend on what the process has set for precision.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; cosine (8) of elva_kernels.reference.
// In: a [M, K] and b [K, N] in fp32, any strides.
// Out: c [M, N] in fp32, or added to it.
// Work split: a block of 256 threads a tile of 128 x 128, or of 64 x 64 where those would leave
//   multiprocessors idle; 16 terms at a time through shared memory, the next ones on their way.
// Bytes: a once for each column of tiles and b once for each row of them, mostly from the
//   second-level cache: tiles that run together are 8 rows of tiles high; c once.
// Numerics: fused terms in fp32, in order, 64 to a sum; those sums in order into another. So an
//   element depends on its row and its column alone, not on its place or on the tile's size.
// Limits: none.
// Reference: elva_kernels.reference.in_batch.cosine_matrix, gradients_of_slopes.
#include "../elva_in_batch_cuda.h"
#include "device.h"

namespace elva {
namespace {

constexpr int kThreads = 256;
constexpr int kDepth = 16;             // terms in shared memory at a time
constexpr int kStepsOfSum = 4;         // of kDepth terms each. Ours: errors below 1e-6
constexpr int64_t kEnoughTiles = 128;  // for a GPU's multiprocessors. Ours
constexpr int64_t kTileRowsTogether = 8;

// Terms of a tile: kSide rows of a, or columns of b, "places" both.
template <int kSide>
struct Terms {
  static constexpr int kStride = kSide + 4;  // vectors stay on 16 bytes
  float at[kDepth * kStride];
};

// A thread's share of a tile's terms of one operand.
template <int kSide>
class Loader {
 public:
  // The operand's element at (place, term) is data[place place_stride + term term_stride].
  __device__ Loader(const void* data, int64_t place_stride, int64_t term_stride, int64_t first,
                    int64_t places) {
    const int thread = static_cast<int>(threadIdx.x);
    const bool along_terms = term_stride == 1;  // neighbours in memory go to neighbouring threads
    place_ = along_terms ? thread / kDepth : thread % kSide;
    term_ = along_terms ? thread % kDepth : thread / kSide;
    const int place_step = along_terms ? kThreads / kDepth : 0;
    term_step_ = along_terms ? 0 : kThreads / kSide;
    stride_ = place_step * place_stride + term_step_ * term_stride;
    advance_ = kDepth * term_stride;
    next_ = static_cast<const float*>(data) + (first + place_) * place_stride + term_ * term_stride;
    put_step_ = term_step_ * Terms<kSide>::kStride + place_step;
    const int64_t left = places - first - place_;
    const int64_t most = left <= 0 ? 0 : along_terms ? (left - 1) / place_step + 1 : kEach;
    here_ = static_cast<int>(most < kEach ? most : kEach);
  }

  // The next kDepth terms, of which `left` are the matrix's; zeros beyond and outside.
  __device__ void fetch(int64_t left) {
    const float* at = next_;
    if (here_ == kEach && left >= kDepth) {
#pragma unroll
      for (int i = 0; i < kEach; ++i, at += stride_) held_[i] = *at;
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i, at += stride_) {
        held_[i] = i < here_ && term_ + i * term_step_ < left ? *at : 0.0f;
      }
    }
    next_ += advance_;
  }

  __device__ void put(Terms<kSide>* terms) const {
    float* at = terms->at + term_ * Terms<kSide>::kStride + place_;
#pragma unroll
    for (int i = 0; i < kEach; ++i, at += put_step_) *at = held_[i];
  }

 private:
  static constexpr int kEach = kSide * kDepth / kThreads;

  const float* next_;
  int64_t stride_, advance_;
  int term_, place_, term_step_, put_step_, here_;
  float held_[kEach];
};

// A thread's rows and columns of a tile, in fours: a warp's are 4 fours of rows, 8 of columns.
__device__ inline int first_row() {
  return static_cast<int>(threadIdx.x / 64 * 4 + threadIdx.x % 32 / 8) * 4;
}
__device__ inline int first_column() {
  return static_cast<int>(threadIdx.x / 32 % 2 * 8 + threadIdx.x % 8) * 4;
}
constexpr int kNextFour = 64;

template <int kSide>
struct Sums {
  static constexpr int kOwn = kSide / 16, kFours = kOwn / 4;
  float at[kOwn][kOwn] = {};

  __device__ static void read(const float* terms, float* out) {
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      const Vector<float> x = load16(terms + four * kNextFour);
#pragma unroll
      for (int i = 0; i < 4; ++i) out[4 * four + i] = x.at[i];
    }
  }

  __device__ void add(const Terms<kSide>& a, const Terms<kSide>& b) {
#pragma unroll
    for (int term = 0; term < kDepth; ++term) {
      float left[kOwn], right[kOwn];
      read(a.at + term * Terms<kSide>::kStride + first_row(), left);
      read(b.at + term * Terms<kSide>::kStride + first_column(), right);
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
#pragma unroll
        for (int c = 0; c < kOwn; ++c) at[r][c] = fmaf(left[r], right[c], at[r][c]);
      }
    }
  }

  // And is zero after it.
  __device__ void move_to(Sums* total) {
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
#pragma unroll
      for (int c = 0; c < kOwn; ++c) total->at[r][c] += at[r][c], at[r][c] = 0;
    }
  }
};

// Four elements of a row of c, from `column`.
__device__ inline void write_four(const ElvaCudaMatrixArgs& args, int64_t row, int64_t column,
                                  bool vectors, const float* sums) {
  float* out = args.c + row * args.c_row_stride + column;
  if (vectors && column + 4 <= args.n) {
    Vector<float> all = args.add ? load16(out) : Vector<float>{};
#pragma unroll
    for (int i = 0; i < 4; ++i) all.at[i] += sums[i];
    store16(out, all);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < args.n) out[i] = args.add ? out[i] + sums[i] : sums[i];
  }
}

template <int kSide>
__device__ inline void write_sums(const ElvaCudaMatrixArgs& args, int64_t row, int64_t column,
                                  const Sums<kSide>& sums) {
  const bool vectors = args.c_row_stride % 4 == 0 && reinterpret_cast<uintptr_t>(args.c) % 16 == 0;
#pragma unroll
  for (int r = 0; r < Sums<kSide>::kOwn; ++r) {
    const int64_t at = row + first_row() + r / 4 * kNextFour + r % 4;
    if (at >= args.m) continue;
#pragma unroll
    for (int four = 0; four < Sums<kSide>::kFours; ++four) {
      write_four(args, at, column + first_column() + four * kNextFour, vectors,
                 sums.at[r] + 4 * four);
    }
  }
}

__host__ __device__ constexpr int64_t tiles_of(int64_t size, int64_t side) {
  return (size + side - 1) / side;
}
// The tile of a block: down kTileRowsTogether rows of tiles first.
struct Place {
  int64_t row, column;

  __device__ Place(const ElvaCudaMatrixArgs& args, int64_t side) {
    const int64_t columns = tiles_of(args.n, side), rows = tiles_of(args.m, side);
    const int64_t band = blockIdx.x / (kTileRowsTogether * columns) * kTileRowsTogether;
    const int64_t high = rows - band < kTileRowsTogether ? rows - band : kTileRowsTogether;
    const int64_t within = blockIdx.x - band * columns;
    row = (band + within % high) * side;
    column = within / high * side;
  }
};

template <int kSide>
__global__ void __launch_bounds__(kThreads, kSide == 128 ? 1 : 2)
    matrix_product(const __grid_constant__ ElvaCudaMatrixArgs args) {
  ELVA_DYNAMIC_SHARED(memory);
  Terms<kSide>* left = reinterpret_cast<Terms<kSide>*>(memory);
  Terms<kSide>* right = left + 2;
  const Place place(args, kSide);
  Loader<kSide> a(args.a.data, args.a.row_stride, args.a.stride, place.row, args.m);
  Loader<kSide> b(args.b.data, args.b.stride, args.b.row_stride, place.column, args.n);
  const auto fetch = [&](int64_t term) {
    a.fetch(args.k - term);
    b.fetch(args.k - term);
  };
  const auto put = [&](int64_t step) {
    a.put(left + step % 2);
    b.put(right + step % 2);
    __syncthreads();
  };
  Sums<kSide> sums, total;
  const int64_t steps = tiles_of(args.k, kDepth);
  if (steps > 0) {
    fetch(0);
    put(0);
  }
#pragma unroll 1
  for (int64_t step = 0; step < steps; ++step) {
    const bool more = step + 1 < steps;
    if (more) fetch((step + 1) * kDepth);
    sums.add(left[step % 2], right[step % 2]);
    if ((step + 1) % kStepsOfSum == 0 || !more) sums.move_to(&total);
    if (more) put(step + 1);  // where all have done with the step before this
  }
  write_sums(args, place.row, place.column, total);
}

template <int kSide>
ElvaStatus run(const ElvaCudaMatrixArgs& args) {
  const int64_t tiles = tiles_of(args.m, kSide) * tiles_of(args.n, kSide);
  return launch(matrix_product<kSide>, tiles, 0, kThreads, 4 * sizeof(Terms<kSide>), args.stream,
                args);
}

}  // namespace
}  // namespace elva

extern "C" ElvaStatus elva_matrix_product_cuda(const ElvaCudaMatrixArgs* args) {
  using namespace elva;
  return on_device(ELVA_FP32, args->device, [args](auto) {
    const bool many = tiles_of(args->m, 128) * tiles_of(args->n, 128) >= kEnoughTiles;
    return many ? run<128>(*args) : run<64>(*args);
  });
}
