// The Python module elva_kernels._C: integers and tuples in, status out, the interpreter released
// while ops run.
#include "bindings.h"

#include <memory>
#include <string>

#include "dlpack_result.h"

namespace {

using elva::check_tuple;
using elva::integer;
using elva::Layout;
using elva::pointer;
using elva::raise_unless_ok;
using elva::run_released;
using elva::set_rows;

void reward_from_scores(int dtype, int threads, py::handle sizes, int64_t candidates,
                        py::handle scores, py::handle mask, py::handle upstream, py::handle weights,
                        uintptr_t reward, uintptr_t margin_reward, uintptr_t rank_reward,
                        uintptr_t rank, uintptr_t grad_scores) {
  ElvaScoresArgs args = {};
  args.dtype = static_cast<ElvaDtype>(dtype);
  args.threads = threads;
  args.candidates = candidates;
  args.weights = elva::reward_weights(weights);
  Layout layout(sizes, &args.batch);
  layout.add(scores, 1, &args.scores);
  layout.add(mask, 1, &args.mask);
  layout.add(upstream, 0, &args.upstream);
  layout.finish();
  args.reward = pointer(reward);
  args.margin_reward = pointer(margin_reward);
  args.rank_reward = pointer(rank_reward);
  args.rank = pointer<int32_t>(rank);
  args.grad_scores = pointer(grad_scores);
  run_released(elva_reward_from_scores_cpu, args);
}

void group_advantages(int dtype, int threads, py::handle sizes, int64_t size, py::handle reward,
                      int scale, double std_eps, double same_reward, uintptr_t advantages) {
  ElvaAdvantagesArgs args = {};
  args.dtype = static_cast<ElvaDtype>(dtype);
  args.threads = threads;
  args.size = size;
  args.scale = static_cast<ElvaScale>(scale);
  args.std_eps = std_eps;
  args.same_reward = same_reward;
  Layout layout(sizes, &args.batch);
  layout.add(reward, 1, &args.reward);
  layout.finish();
  args.advantages = pointer(advantages);
  run_released(elva_group_advantages_cpu, args);
}

void topk(int dtype, int threads, int metric, int64_t queries, int64_t rows, int64_t dim, int64_t k,
          py::handle query, py::handle corpus, uintptr_t scores, uintptr_t index) {
  ElvaTopkArgs args = {};
  args.dtype = static_cast<ElvaDtype>(dtype);
  args.threads = threads;
  args.metric = static_cast<ElvaMetric>(metric);
  args.queries = queries;
  args.rows = rows;
  args.dim = dim;
  args.k = k;
  set_rows(query, &args.query);
  set_rows(corpus, &args.corpus);
  args.scores = pointer(scores);
  args.index = pointer<int64_t>(index);
  run_released(elva_topk_cpu, args);
}

void unit_rows(int dtype, int unit_dtype, int threads, int64_t count, int64_t dim, uintptr_t rows,
               int64_t row_stride, int64_t stride, uintptr_t unit, uintptr_t norm) {
  ElvaUnitRowsArgs args = {};
  args.dtype = static_cast<ElvaDtype>(dtype);
  args.unit_dtype = static_cast<ElvaDtype>(unit_dtype);
  args.threads = threads;
  args.count = count;
  args.dim = dim;
  args.rows.data = pointer(rows);
  args.rows.row_stride = row_stride;
  args.rows.stride = stride;
  args.unit = pointer(unit);
  args.norm = pointer<double>(norm);
  run_released(elva_unit_rows_cpu, args);
}

void unit_gradient(int dtype, int unit_dtype, int threads, int64_t count, int64_t dim,
                   uintptr_t unit, uintptr_t grad_unit, uintptr_t norm, uintptr_t grad_rows) {
  run_released(
      elva_unit_gradient_cpu,
      ElvaUnitGradientArgs{static_cast<ElvaDtype>(dtype), static_cast<ElvaDtype>(unit_dtype),
                           threads, count, dim, pointer(unit), pointer(grad_unit),
                           pointer<double>(norm), pointer(grad_rows)});
}

void matrix_product(int a_dtype, int b_dtype, int threads, int64_t m, int64_t n, int64_t k,
                    uintptr_t a, int64_t a_row_stride, int64_t a_stride, uintptr_t b,
                    int64_t b_row_stride, int64_t b_stride, uintptr_t c, int64_t c_row_stride,
                    bool add, uintptr_t a_scale, uintptr_t a_norm, double allowed) {
  run_released(elva_matrix_product_cpu,
               ElvaMatrixArgs{static_cast<ElvaDtype>(a_dtype), static_cast<ElvaDtype>(b_dtype),
                              threads, m, n, k, pointer(a), a_row_stride, a_stride, pointer(b),
                              b_row_stride, b_stride, pointer(c), c_row_stride, add,
                              pointer<float>(a_scale), pointer<float>(a_norm), allowed});
}

double column_norm(int threads, int64_t count, int64_t dim, uintptr_t rows, uintptr_t scale) {
  double norm = 0;
  run_released(elva_column_norm_cpu, ElvaColumnNormArgs{threads, count, dim, pointer(rows),
                                                        pointer<float>(scale), &norm});
  return norm;
}

void add_rows(int threads, int64_t count, int64_t dim, uintptr_t from, uintptr_t into,
              uintptr_t factor, uintptr_t rows, uintptr_t out, int64_t out_count) {
  run_released(elva_add_rows_cpu, ElvaAddRowsArgs{threads, count, dim, pointer<int64_t>(from),
                                                  pointer<int64_t>(into), pointer<float>(factor),
                                                  pointer(rows), pointer<float>(out), out_count});
}

void score_rows(int dtype, int threads, int64_t rows, int64_t candidates, int64_t width,
                uintptr_t scores, uintptr_t penalty, uintptr_t scale, uintptr_t norm,
                uintptr_t target, uintptr_t ids, double max_score, double inverse_temperature,
                int64_t k, uintptr_t n_greater, uintptr_t n_equal, uintptr_t target_score,
                uintptr_t hardest_score, uintptr_t hardest_index, uintptr_t topk_scores,
                uintptr_t topk_index, uintptr_t sum, uintptr_t moment) {
  run_released(elva_score_rows_cpu, ElvaScoreRowsArgs{static_cast<ElvaDtype>(dtype),
                                                      threads,
                                                      rows,
                                                      candidates,
                                                      width,
                                                      pointer(scores),
                                                      pointer(penalty),
                                                      pointer(scale),
                                                      pointer<double>(norm),
                                                      pointer<int64_t>(target),
                                                      pointer<int64_t>(ids),
                                                      max_score,
                                                      inverse_temperature,
                                                      k,
                                                      pointer<int32_t>(n_greater),
                                                      pointer<int32_t>(n_equal),
                                                      pointer(target_score),
                                                      pointer(hardest_score),
                                                      pointer<int64_t>(hardest_index),
                                                      pointer(topk_scores),
                                                      pointer<int64_t>(topk_index),
                                                      pointer<double>(sum),
                                                      pointer<double>(moment)});
}

void info_nce_terms(int dtype, int64_t count, uintptr_t target_score, uintptr_t at, uintptr_t peak,
                    uintptr_t sum, uintptr_t moment, double temperature, uintptr_t loss,
                    uintptr_t share, uintptr_t others, uintptr_t heat) {
  run_released(
      elva_info_nce_terms_cpu,
      ElvaInfoNceTermsArgs{static_cast<ElvaDtype>(dtype), count, pointer(target_score),
                           pointer<int64_t>(at), pointer(peak), pointer<double>(sum),
                           pointer<double>(moment), temperature, pointer<double>(loss),
                           pointer<double>(share), pointer<double>(others), pointer<double>(heat)});
}

void slope_rows(int dtype, int threads, int64_t rows, int64_t width, uintptr_t scores,
                uintptr_t row_peak, uintptr_t row_factor, uintptr_t target_slope, uintptr_t target,
                uintptr_t column_peak, uintptr_t column_factor, double inverse_temperature) {
  run_released(
      elva_slope_rows_cpu,
      ElvaSlopeRowsArgs{static_cast<ElvaDtype>(dtype), threads, rows, width, pointer(scores),
                        pointer(row_peak), pointer(row_factor), pointer(target_slope),
                        pointer<int64_t>(target), pointer(column_peak), pointer(column_factor),
                        inverse_temperature});
}

void column_sums(int dtype, int threads, int64_t rows, int64_t width, uintptr_t scores,
                 double inverse_temperature, uintptr_t peak, uintptr_t sum, uintptr_t moment) {
  run_released(elva_column_sums_cpu,
               ElvaColumnSumsArgs{static_cast<ElvaDtype>(dtype), threads, rows, width,
                                  pointer(scores), inverse_temperature, pointer(peak),
                                  pointer<double>(sum), pointer<double>(moment)});
}

// An uninitialised tensor of the shape `sizes`, as a DLPack capsule.
py::capsule empty(int dtype, py::tuple sizes) {
  constexpr uint8_t kFloat = 2, kBfloat = 4, kBits[] = {16, 16, 32, 64};
  auto result = std::make_unique<Result>();
  DLTensor& tensor = result->managed.tensor;
  if (sizes.size() > std::size(result->shape)) {
    throw std::invalid_argument("elva_kernels._C: too many dimensions");
  }
  tensor.dtype = {dtype == ELVA_BF16 ? kBfloat : kFloat, kBits[dtype], 1};
  int64_t bytes = kBits[dtype] / 8;
  for (py::handle size : sizes) bytes *= result->shape[tensor.ndim++] = size.cast<int64_t>();
  tensor.shape = result->shape;
  tensor.device = {1, 0};
  result->managed.context = result.get();
  result->managed.deleter = release;
  raise_unless_ok(elva_acquire_block(bytes, &result->block));
  tensor.data = result->block.data;
  PyObject* capsule = PyCapsule_New(&result->managed, "dltensor", [](PyObject* unused) {
    if (!PyCapsule_IsValid(unused, "dltensor")) return;  // a tensor has it
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(unused, "dltensor"));
    managed->deleter(managed);
  });
  if (capsule == nullptr) {
    release(&result.release()->managed);
    throw py::error_already_set();
  }
  result.release();
  return py::reinterpret_steal<py::capsule>(capsule);
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#else
  info["compiler"] = std::string("gcc ") + __VERSION__;
#endif
#ifdef ELVA_CUDA_ARCHS
  const std::string archs = ELVA_CUDA_ARCHS;
#else
  const std::string archs;
#endif
  info["cuda"] = !archs.empty();
  info["cuda_archs"] = archs;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C API of csrc/elva.h. Private: called by elva_kernels.native alone.";
  module.def("reward_forward", &elva::reward_forward<elva_reward_forward_cpu>);
  module.def("reward_backward", &elva::reward_backward<elva_reward_backward_cpu>);
  module.def("reward_from_scores", &reward_from_scores);
  module.def("group_advantages", &group_advantages);
  module.def("topk", &topk);
  module.def("empty", &empty);
  module.def("unit_rows", &unit_rows);
  module.def("unit_gradient", &unit_gradient);
  module.def("matrix_product", &matrix_product);
  module.def("column_norm", &column_norm);
  module.def("add_rows", &add_rows);
  module.def("multiplies_bf16", &elva_multiplies_bf16);
  module.def("score_rows", &score_rows);
  module.def("info_nce_terms", &info_nce_terms);
  module.def("slope_rows", &slope_rows);
  module.def("column_sums", &column_sums);
  module.def("build_info", &build_info);
  module.def("level", [] {
    const char* level = elva_cpu_level();
    if (level == nullptr) raise_unless_ok(ELVA_BAD_LEVEL);
    return std::string(level);
  });
  module.def("levels", [] { return std::string(elva_cpu_levels()); });
  module.def("reset_level", &elva_cpu_level_reset);
#ifdef ELVA_CUDA_ARCHS
  elva::bind_cuda(module);
#endif
}
