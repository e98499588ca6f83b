// The Python module elva_kernels._C: integers and tuples in, status out, the interpreter released
// while ops run.
#include "bindings.h"

#include <memory>
#include <string>

#include "dlpack_result.h"

namespace {

using elva::Layout;
using elva::pointer;
using elva::raise_unless_ok;
using elva::run_released;

void reward_from_scores(int dtype, int threads, py::handle sizes, int64_t candidates,
                        py::handle scores, py::handle mask, uintptr_t relevance,
                        py::handle upstream, py::handle weights, uintptr_t reward,
                        uintptr_t margin_reward, uintptr_t rank_reward, uintptr_t rank,
                        uintptr_t grad_scores) {
  ElvaScoresArgs args = {};
  args.dtype = static_cast<ElvaDtype>(dtype);
  args.threads = threads;
  args.candidates = candidates;
  args.relevance = pointer(relevance);
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

double column_norm(int threads, int64_t count, int64_t dim, uintptr_t rows, uintptr_t scale) {
  double norm = 0;
  run_released(elva_column_norm_cpu, ElvaColumnNormArgs{threads, count, dim, pointer(rows),
                                                        pointer<float>(scale), &norm});
  return norm;
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
  const std::string archs = ELVA_CUDA_ARCHS, lacks;
#else
  const std::string archs, lacks = ELVA_CUDA_LACKS;
#endif
  info["cuda"] = !archs.empty();
  info["cuda_archs"] = archs;
  info["cuda_lacks"] = lacks;  // why there are none
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C API of csrc. Private: called by elva_kernels alone.";
  module.def("reward_forward", &elva::reward_forward<elva_reward_forward_cpu>);
  module.def("reward_backward", &elva::reward_backward<elva_reward_backward_cpu>);
  module.def("bank_gradient", &elva::bank_gradient<elva_bank_gradient_cpu>);
  module.def("reward_from_scores", &reward_from_scores);
  module.def("group_advantages", &group_advantages);
  elva::bind(module, "topk", elva_topk_cpu);
  elva::bind(module, "row_codes", elva_row_codes_cpu);
  elva::bind(module, "nearest_codes", elva_nearest_codes_cpu);
  module.def("empty", &empty);
  elva::bind(module, "unit_rows", elva_unit_rows_cpu);
  elva::bind(module, "unit_gradient", elva_unit_gradient_cpu);
  elva::bind(module, "matrix_product", elva_matrix_product_cpu);
  module.def("column_norm", &column_norm);
  elva::bind(module, "add_rows", elva_add_rows_cpu);
  module.def("multiplies_bf16", &elva_multiplies_bf16);
  elva::bind(module, "exclusion", elva_exclusion_cpu);
  elva::bind(module, "spoil", elva_spoil_cpu);
  elva::bind(module, "spread_rows", elva_spread_rows_cpu);
  elva::bind(module, "score_rows", elva_score_rows_cpu);
  elva::bind(module, "info_nce_terms", elva_info_nce_terms_cpu);
  elva::bind(module, "slope_rows", elva_slope_rows_cpu);
  elva::bind(module, "column_sums", elva_column_sums_cpu);
  elva::bind(module, "head_reward", elva_head_reward_cpu);
  elva::bind(module, "logsumexp", elva_logsumexp_cpu);
  elva::bind(module, "info_nce_factors", elva_info_nce_factors_cpu);
  module.def("enter_default_float_mode", [] {
    const uint64_t before = elva::float_mode();
    elva::set_float_mode(elva::kDefaultFloatMode);
    return before;
  });
  module.def("set_float_mode", &elva::set_float_mode);
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
