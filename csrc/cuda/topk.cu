// What: scores of topk: some queries against corpus rows, each row read once for up to 64 queries
//   (8 in fp32); where the caller multiplies, what makes scores of its products.
// Source: topk (15) of elva_kernels.reference; the best are chosen by select.cu.
// In: query [Q, D], corpus [P, D] in bf16, fp16 or fp32, any strides and any alignment (dense rows
//   on 16 bytes are copied ahead).
// Out: scores [Q, P] in fp32, cosines or dots; -inf where a row or its query is not finite.
// Work split: a block 256 rows and a group of queries, which pass by in pieces through shared
//   memory; a warp 32 rows, 128 bytes of each at a time through a ring of its own: in matrix
//   instructions in half precision, else in fp32 products.
// Bytes: the corpus once for each group of queries (from the second-level cache but for the first),
//   the scores written once; 8 KB a warp on their way.
// Numerics: products exact, sums in fp32 over the columns in one order whatever Q and P are;
//   squares by 64 in fp32, then in double; blocks with rows out of range once more, those rows
//   scaled by a power of two. No atomics: the same bits on every run.
// Limits: D < 2^30; factors in half precision alone.
// Reference: elva_kernels.reference.topk.
#include "topk_products.h"

namespace elva {
namespace {

// A warp a query.
template <class T>
__global__ void __launch_bounds__(32, 16) topk_queries(const __grid_constant__ TopkArgs args) {
  constexpr int kSize = Vector<T>::kSize;
  const ElvaTopkScoresArgs& topk = args.topk;
  const int64_t q = blockIdx.x;
  T* out = static_cast<T*>(args.queries) + q * args.padded_dim;
  Row<T> row{static_cast<const T*>(topk.query.data) + q * topk.query.row_stride, topk.query.stride,
             0};
  const bool dense = row.is_dense();
  const double square = row_sums(row, row, topk.dim, kSegment).y;
  const double norm = norm_of(&row, square, topk.dim, kSegment);
#pragma unroll 4
  for (int64_t at = threadIdx.x * kSize; at < args.padded_dim; at += 32 * kSize) {
    Vector<T> x = isnan(norm) ? Vector<T>{} : row.packed(at, topk.dim, dense);
    if (row.exponent != 0) x = rescaled(x, row.exponent);
    store16(out + at, x);
  }
  if (threadIdx.x > 0) return;
  const double inverse = inverse_norm(norm);
  args.inverses[q] = {inverse, static_cast<double>(row.exponent)};
  if (topk.row_factor == nullptr) return;
  const bool is_product = topk.metric == ELVA_DOT && !isnan(norm);
  topk.row_factor[q] = static_cast<float>(is_product ? scalbn(1.0, row.exponent) : inverse);
}

// Blocks whose memory a multiprocessor holds.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int kBlocks = 1;
#else
constexpr int kBlocks = 2;
#endif
template <class T, int kGroup>
__global__ void __launch_bounds__(kThreads, kBlocks)
    topk_scores(const __grid_constant__ TopkArgs args) {
  ELVA_DYNAMIC_SHARED(memory);
  const int64_t groups = args.padded_queries / kGroup, first_query = blockIdx.x % groups * kGroup;
  Products<T, kGroup> products(args, blockIdx.x / groups * kBlockRows, memory);
  bool is_scaled = false, has_exponents = false;
#pragma unroll 1
  while (true) {
    products.multiply(first_query, is_scaled);
    if (is_scaled || !products.mark_far_rows()) break;
    has_exponents = true;
    is_scaled = products.read_exponents();
    if (!is_scaled) break;
  }
  products.write(first_query, has_exponents, [](int64_t) { return true; });
}

// A warp 32 rows, one after the other.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    topk_row_factors(const __grid_constant__ TopkArgs args) {
  constexpr int kSize = Vector<T>::kSize, kAtOnce = 4;
  const ElvaTopkScoresArgs& topk = args.topk;
  const int64_t first = int64_t{blockIdx.x} * kBlockRows + threadIdx.x / 32 * kWarpRows;
  const int64_t last = first + kWarpRows < topk.rows ? first + kWarpRows : topk.rows;
#pragma unroll 1
  for (int64_t i = first; i < last; ++i) {
    const Row<T> row{static_cast<const T*>(topk.corpus.data) + i * topk.corpus.row_stride,
                     topk.corpus.stride, 0};
    const bool dense = row.is_dense();
    double square = 0;
#pragma unroll 1
    for (int64_t at = threadIdx.x % 32 * kSize; at < topk.dim; at += kAtOnce * 32 * kSize) {
      Words held[kAtOnce];
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v) {
        const Vector<T> x = row.packed(at + v * 32 * kSize, topk.dim, dense);
        memcpy(held + v, &x, sizeof(x));
      }
      float squares[2] = {};
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v) {
        const Vector<T> x = elements<T>(held[v]);
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          squares[e % 2] = fmaf(widen(x.at[e]), widen(x.at[e]), squares[e % 2]);
        }
      }
      square += squares[0] + squares[1];
    }
    square = warp_sum(square);
    double factor = topk.metric == ELVA_COSINE ? 1 / sqrt(square) : 1.0;
    if (!is_topk_range(square)) {
      const bool is_zero = warp_exponent(row, topk.dim) == kZero;
      factor = !is_zero ? -1 : topk.metric == ELVA_COSINE ? 0 : 1;
    }
    if (threadIdx.x % 32 == 0) topk.column_factor[i] = static_cast<float>(factor);
  }
}

// A block 256 rows: of those out of range or not finite, the scores with all queries.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    topk_far_scores(const __grid_constant__ TopkArgs args) {
  constexpr int kGroup = kFewQueries<T>;
  ELVA_DYNAMIC_SHARED(memory);
  const ElvaTopkScoresArgs& topk = args.topk;
  const int64_t first_row = int64_t{blockIdx.x} * kBlockRows, own = first_row + threadIdx.x;
  if (__syncthreads_or(own < topk.rows && topk.column_factor[own] < 0) == 0) return;
  Products<T, kGroup> products(args, first_row, memory);
  products.mark(own < topk.rows && topk.column_factor[own] < 0);
  const bool is_scaled = products.read_exponents();
#pragma unroll 1
  for (int64_t first_query = 0; first_query < topk.queries; first_query += kGroup) {
    if (is_scaled) products.multiply(first_query, true);  // else none is finite
    products.write(first_query, true, [&](int64_t row) { return topk.column_factor[row] < 0; });
  }
}

// Lays out the scratch, of which the bytes are given back.
template <class T>
int64_t pad(const ElvaTopkScoresArgs& topk, TopkArgs* args) {
  constexpr int64_t kMostPiece = 1024 / static_cast<int64_t>(sizeof(T));
  args->topk = topk;
  args->group = topk.queries > kFewQueries<T> ? kManyQueries<T> : kFewQueries<T>;
  args->padded_dim = rounded_up(topk.dim, kMostPiece);
  args->padded_queries = rounded_up(topk.queries, args->group);
  const int64_t queries = args->padded_queries * args->padded_dim * static_cast<int64_t>(sizeof(T));
  unsigned char* scratch = static_cast<unsigned char*>(topk.scratch);
  args->queries = scratch;
  args->inverses = reinterpret_cast<double2*>(scratch + queries);
  return queries + args->padded_queries * static_cast<int64_t>(sizeof(double2));
}

template <class T>
ElvaStatus launch_queries(const TopkArgs& args) {
  if (args.topk.dim >= int64_t{1} << 30) return ELVA_UNSUPPORTED;  // columns are ints
  return launch(topk_queries<T>, args.topk.queries, 0, 32, 0, args.topk.stream, args);
}

int64_t row_blocks(const ElvaTopkScoresArgs& topk) {
  return (topk.rows + kBlockRows - 1) / kBlockRows;
}

template <class T, int kGroup>
ElvaStatus launch_scores(const TopkArgs& args) {
  return launch(topk_scores<T, kGroup>, row_blocks(args.topk) * (args.padded_queries / kGroup), 0,
                kThreads, sizeof(Shared<T, kGroup>), args.topk.stream, args);
}

template <class T>
ElvaStatus scores(const ElvaTopkScoresArgs& topk) {
  TopkArgs args;
  pad<T>(topk, &args);
  const ElvaStatus status = launch_queries<T>(args);
  if (status != ELVA_OK) return status;
  return args.group == kFewQueries<T> ? launch_scores<T, kFewQueries<T>>(args)
                                      : launch_scores<T, kManyQueries<T>>(args);
}

template <class T>
ElvaStatus factors(const ElvaTopkScoresArgs& topk) {
  TopkArgs args;
  pad<T>(topk, &args);
  const ElvaStatus status = launch_queries<T>(args);
  if (status != ELVA_OK) return status;
  return launch(topk_row_factors<T>, row_blocks(topk), 0, kThreads, 0, topk.stream, args);
}

template <class T>
ElvaStatus far_scores(const ElvaTopkScoresArgs& topk) {
  TopkArgs args;
  pad<T>(topk, &args);
  return launch(topk_far_scores<T>, row_blocks(topk), 0, kThreads,
                sizeof(Shared<T, kFewQueries<T>>), topk.stream, args);
}

}  // namespace
}  // namespace elva

extern "C" {

int64_t elva_topk_scratch_bytes_cuda(const ElvaTopkScoresArgs* args, int64_t* padded_dim) {
  elva::TopkArgs all;
  const int64_t bytes =
      args->dtype == ELVA_FP32 ? elva::pad<float>(*args, &all) : elva::pad<elva::Bf16>(*args, &all);
  *padded_dim = all.padded_dim;
  return bytes;
}

ElvaStatus elva_topk_scores_cuda(const ElvaTopkScoresArgs* args) {
  return elva::on_device(args->dtype, args->device,
                         [args](auto element) { return elva::scores<decltype(element)>(*args); });
}

ElvaStatus elva_topk_factors_cuda(const ElvaTopkScoresArgs* args) {
  return elva::on_device(args->dtype, args->device, [args](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) return elva::factors<T>(*args);
    return ELVA_UNSUPPORTED;
  });
}

ElvaStatus elva_topk_far_cuda(const ElvaTopkScoresArgs* args) {
  return elva::on_device(args->dtype, args->device, [args](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) return elva::far_scores<T>(*args);
    return ELVA_UNSUPPORTED;
  });
}

}  // extern "C"
