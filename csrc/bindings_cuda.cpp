// The functions of csrc/cuda in elva_kernels._C: pointers on a device, and a stream.
#include "bindings.h"

namespace elva {
namespace {

int64_t scratch_bytes(int64_t groups, int64_t negatives) {
  return elva_reward_scratch_bytes_cuda(groups, negatives);
}

int64_t topk_scratch_bytes(int dtype, int64_t queries, int64_t rows, int64_t dim) {
  ElvaTopkScoresArgs args = {};
  args.dtype = static_cast<ElvaDtype>(dtype);
  args.queries = queries;
  args.rows = rows;
  args.dim = dim;
  return elva_topk_scratch_bytes_cuda(&args);
}

void topk_scores(int dtype, int device, uintptr_t stream, int metric, int64_t queries, int64_t rows,
                 int64_t dim, py::handle query, py::handle corpus, uintptr_t scratch,
                 uintptr_t scores) {
  ElvaTopkScoresArgs args = {};
  args.dtype = static_cast<ElvaDtype>(dtype);
  args.device = device;
  args.stream = pointer(stream);
  args.metric = static_cast<ElvaMetric>(metric);
  args.queries = queries;
  args.rows = rows;
  args.dim = dim;
  set_rows(query, &args.query);
  set_rows(corpus, &args.corpus);
  args.scratch = pointer(scratch);
  args.scores = pointer<float>(scores);
  run_released(elva_topk_scores_cuda, args);
}

void unit_rows(int dtype, int device, uintptr_t stream, int64_t count, int64_t dim, py::handle rows,
               uintptr_t unit, uintptr_t norm) {
  ElvaCudaUnitArgs args = {};
  args.dtype = static_cast<ElvaDtype>(dtype);
  args.device = device;
  args.stream = pointer(stream);
  args.count = count;
  args.dim = dim;
  set_rows(rows, &args.rows);
  args.unit = pointer(unit);
  args.norm = pointer<double>(norm);
  run_released(elva_unit_rows_cuda, args);
}

void unit_gradient(int dtype, int device, uintptr_t stream, int64_t count, int64_t dim,
                   uintptr_t unit, uintptr_t grad_unit, uintptr_t norm, uintptr_t grad_rows) {
  run_released(elva_unit_gradient_cuda,
               ElvaCudaGradientArgs{static_cast<ElvaDtype>(dtype), device, pointer(stream), count,
                                    dim, pointer(unit), pointer<float>(grad_unit),
                                    pointer<double>(norm), pointer(grad_rows)});
}

void score_rows(int device, uintptr_t stream, int64_t rows, int64_t candidates, int64_t width,
                uintptr_t scores, uintptr_t query_norm, uintptr_t candidate_norm, uintptr_t target,
                uintptr_t ids, double max_score, uintptr_t temperature, uintptr_t n_greater,
                uintptr_t n_equal, uintptr_t target_score, uintptr_t hardest_score,
                uintptr_t hardest_index, uintptr_t sum, uintptr_t moment) {
  run_released(
      elva_score_rows_cuda,
      ElvaCudaScoreArgs{device, pointer(stream), rows, candidates, width, pointer<float>(scores),
                        pointer<double>(query_norm), pointer<double>(candidate_norm),
                        pointer<int64_t>(target), pointer<int64_t>(ids), max_score,
                        pointer<double>(temperature), pointer<int32_t>(n_greater),
                        pointer<int32_t>(n_equal), pointer<float>(target_score),
                        pointer<float>(hardest_score), pointer<int64_t>(hardest_index),
                        pointer<double>(sum), pointer<double>(moment)});
}

void column_sums(int device, uintptr_t stream, int64_t rows, int64_t width, uintptr_t scores,
                 uintptr_t temperature, uintptr_t peak, uintptr_t sum, uintptr_t moment) {
  run_released(elva_column_sums_cuda,
               ElvaCudaColumnArgs{device, pointer(stream), rows, width, pointer<float>(scores),
                                  pointer<double>(temperature), pointer<float>(peak),
                                  pointer<double>(sum), pointer<double>(moment)});
}

void slope_rows(int device, uintptr_t stream, int64_t rows, int64_t width, uintptr_t scores,
                uintptr_t temperature, uintptr_t row_peak, uintptr_t row_factor,
                uintptr_t target_slope, uintptr_t target, uintptr_t column_peak,
                uintptr_t column_factor) {
  run_released(elva_slope_rows_cuda,
               ElvaCudaSlopeArgs{device, pointer(stream), rows, width, pointer<float>(scores),
                                 pointer<double>(temperature), pointer<float>(row_peak),
                                 pointer<float>(row_factor), pointer<float>(target_slope),
                                 pointer<int64_t>(target), pointer<float>(column_peak),
                                 pointer<float>(column_factor)});
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.def("cuda_reward_scratch_bytes", &scratch_bytes);
  module.def("cuda_reward_forward", &reward_forward<elva_reward_forward_cuda>);
  module.def("cuda_reward_backward", &reward_backward<elva_reward_backward_cuda>);
  module.def("cuda_topk_scratch_bytes", &topk_scratch_bytes);
  module.def("cuda_topk_scores", &topk_scores);
  module.def("cuda_unit_rows", &unit_rows);
  module.def("cuda_unit_gradient", &unit_gradient);
  module.def("cuda_score_rows", &score_rows);
  module.def("cuda_column_sums", &column_sums);
  module.def("cuda_slope_rows", &slope_rows);
}

}  // namespace elva
