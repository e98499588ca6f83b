// What: bounds of cosines by 8-bit codes: some queries against coded rows, each row read once for up
//   to 32 queries.
// Source: nearest_codes (17) of elva_kernels.reference; the best are chosen by select.cu.
// In: codes [P, D] in int8 (rows on 16 bytes are copied ahead, others read by bytes), their scales
//   and losses; queries [Q, 2, D], both bytes, padded by zeros; a mask or none.
// Out: bounds [Q, P] in fp32; -inf where the mask hides the row.
// Work split: as topk.cu, a query's two bytes as two of its queries: a block 256 rows and 16
//   queries, or 32 where there are more; a warp 32 rows, in matrix instructions of 8-bit integers.
// Bytes: the codes once for 32 queries (from the second-level cache but for the first), the bounds
//   written once. An H200 by arithmetic, 1,000,000 x 1536, with 85 % of 4.8 TB/s and half of 1,979
//   integer TOPS: Q = 1 and 32 the read of 1.54 GB, 0.38 ms (32: 0.2 ms of products beside it,
//   0.06 ms for bounds and choice behind it); Q = 256 products, 1.6 ms, and 0.5 ms of bounds.
// Numerics: products exact: each byte's below 2^31. Nine roundings in fp32, below 1e-6 together,
//   for which SCORE_ERROR leaves room. No atomics: the same bits on every run.
// Limits: D at most 65,536.
// Reference: elva_kernels.reference.score_bounds.
#include "topk_products.h"

namespace elva {
namespace {

constexpr float kFineStep = 1.0f / 256;
constexpr float kScoreError = 1.2e-5f;
constexpr int kBytes = 2;  // of a query's element, as two queries of Products

struct BoundsArgs {
  TopkArgs products;
  ElvaCodeBoundsArgs codes;
};

// Also of a row or a query that is not finite, whose loss is infinite.
__device__ inline float bound_of(int32_t code, int32_t fine, float scale, float missed,
                                 float lost) {
  const float near = scale * fmaf(static_cast<float>(fine), kFineStep, static_cast<float>(code));
  return near + fmaf(missed, 1 + lost, lost);
}

#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int kBlocks = 1;
#else
constexpr int kBlocks = 2;
#endif
template <int kGroup>
__global__ void __launch_bounds__(kThreads, kBlocks)
    code_bounds(const __grid_constant__ BoundsArgs args) {
  ELVA_DYNAMIC_SHARED(memory);
  const ElvaCodeBoundsArgs& codes = args.codes;
  const int64_t groups = args.products.padded_queries / kGroup,
                first = blockIdx.x % groups * kGroup;
  Products<int8_t, kGroup> products(args.products, blockIdx.x / groups * kBlockRows, memory);
  products.multiply(first, false);
  products.visit([&](int64_t row, const auto& dots) {
    const bool is_hidden = codes.mask != nullptr && codes.mask[row] == 0;
    const float scale = codes.scale[row], lost = codes.lost[row];
#pragma unroll 1
    for (int n = 0; n < kGroup; n += kBytes) {
      const int64_t query = (first + n) / kBytes;
      if (query >= codes.queries) break;
      const float bound = bound_of(dots(n), dots(n + 1), codes.query_scale[query] * scale,
                                   codes.query_lost[query] + kScoreError, lost);
      codes.bounds[query * codes.rows + row] = is_hidden ? -INFINITY : bound;
    }
  });
}

template <int kGroup>
ElvaStatus launch_code_bounds(BoundsArgs* args) {
  TopkArgs& products = args->products;
  products.group = kGroup;
  products.padded_queries = rounded_up(products.topk.queries, kGroup);
  const int64_t blocks =
      rounded_up(products.topk.rows, kBlockRows) / kBlockRows * (products.padded_queries / kGroup);
  return launch(code_bounds<kGroup>, blocks, 0, kThreads, sizeof(Shared<int8_t, kGroup>),
                args->codes.stream, *args);
}

}  // namespace
}  // namespace elva

extern "C" ElvaStatus elva_code_bounds_cuda(const ElvaCodeBoundsArgs* codes) {
  using namespace elva;
  static_assert(ELVA_CODE_PIECE % Tile<int8_t, kFewQueries<int8_t>>::kPiece == 0 &&
                ELVA_CODE_PIECE % Tile<int8_t, kManyQueries<int8_t>>::kPiece == 0);
  if (codes->dim > 65536) return ELVA_UNSUPPORTED;
  const OnDevice there(codes->device);
  const ElvaStatus status = status_of(there.error());
  if (status != ELVA_OK) return status;
  BoundsArgs args = {};
  args.codes = *codes;
  args.products.topk.queries = kBytes * codes->queries;
  args.products.topk.rows = codes->rows;
  args.products.topk.dim = codes->dim;
  args.products.topk.corpus.data = codes->code;
  args.products.topk.corpus.row_stride = codes->dim;
  args.products.topk.corpus.stride = 1;
  args.products.padded_dim = codes->padded_dim;
  args.products.queries = const_cast<int8_t*>(codes->query);
  return args.products.topk.queries <= kFewQueries<int8_t>
             ? launch_code_bounds<kFewQueries<int8_t>>(&args)
             : launch_code_bounds<kManyQueries<int8_t>>(&args);
}
