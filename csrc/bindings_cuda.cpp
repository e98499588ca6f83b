// The functions of csrc/cuda in elva_kernels._C: pointers on a device, and a stream.
#include "bindings.h"
#include "elva_in_batch_cuda.h"

namespace elva {
namespace {

// Bytes, and the elements from one of its queries to the next.
py::tuple topk_scratch(int dtype, int64_t queries, int64_t dim) {
  ElvaTopkScoresArgs args = {};
  args.dtype = static_cast<ElvaDtype>(dtype);
  args.queries = queries;
  args.dim = dim;
  int64_t padded_dim = 0;
  const int64_t bytes = elva_topk_scratch_bytes_cuda(&args, &padded_dim);
  return py::make_tuple(bytes, padded_dim);
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.def("cuda_reward_scratch_bytes", &elva_reward_scratch_bytes_cuda);
  module.def("cuda_reward_forward", &reward_forward<elva_reward_forward_cuda>);
  module.def("cuda_reward_backward", &reward_backward<elva_reward_backward_cuda>);
  module.def("cuda_bank_gradient", &bank_gradient<elva_bank_gradient_cuda>);
  module.def("cuda_topk_scratch", &topk_scratch);
  bind(module, "cuda_topk_scores", elva_topk_scores_cuda);
  bind(module, "cuda_topk_factors", elva_topk_factors_cuda);
  bind(module, "cuda_topk_far", elva_topk_far_cuda);
  module.attr("CUDA_CODE_PIECE") = static_cast<int>(ELVA_CODE_PIECE);
  bind(module, "cuda_code_bounds", elva_code_bounds_cuda);
  module.attr("CUDA_SELECT_MOST") = static_cast<int>(ELVA_SELECT_MOST);
  module.def("cuda_select_scratch_bytes", &elva_select_scratch_bytes_cuda);
  bind(module, "cuda_select", elva_select_cuda);
  module.def("cuda_column_scratch_bytes", &elva_column_scratch_bytes_cuda);
  bind(module, "cuda_unit_rows", elva_unit_rows_cuda);
  bind(module, "cuda_matrix_product", elva_matrix_product_cuda);
  bind(module, "cuda_score_rows", elva_score_rows_cuda);
  bind(module, "cuda_column_sums", elva_column_sums_cuda);
  bind(module, "cuda_info_nce_pairs", elva_info_nce_pairs_cuda);
  bind(module, "cuda_column_factor", elva_column_factor_cuda);
  bind(module, "cuda_info_nce_total", elva_info_nce_total_cuda);
  bind(module, "cuda_slope_rows", elva_slope_rows_cuda);
  bind(module, "cuda_spread_rows", elva_spread_rows_cuda);
  bind(module, "cuda_unit_gradient", elva_unit_gradient_cuda);
  bind(module, "cuda_head_reward", elva_head_reward_cuda);
}

}  // namespace elva
