// The functions of csrc/cuda in elva_kernels._C: pointers on a device, and a stream.
#include "bindings.h"

namespace elva {
namespace {

// Of one call: where it runs.
void set_place(int dtype, int device, uintptr_t stream, ElvaRewardArgs* args) {
  args->dtype = static_cast<ElvaDtype>(dtype);
  args->device = device;
  args->stream = pointer(stream);
}

int64_t scratch_bytes(int64_t groups, int64_t negatives) {
  return elva_reward_scratch_bytes_cuda(groups, negatives);
}

void reward_forward(int dtype, int device, uintptr_t stream, py::handle sizes, int64_t negatives,
                    int64_t dim, py::handle query, py::handle positive, py::handle negative,
                    py::handle mask, py::handle upstream, double margin, double rank_penalty,
                    double w_margin, double w_rank, double rank_temperature, uintptr_t scratch,
                    uintptr_t reward, uintptr_t margin_reward, uintptr_t rank_reward,
                    uintptr_t rank, uintptr_t scores, uintptr_t coefficients, uintptr_t grad_query,
                    uintptr_t grad_positive, uintptr_t grad_negative) {
  ElvaRewardArgs args = {};
  set_place(dtype, device, stream, &args);
  args.negatives = negatives;
  args.dim = dim;
  args.weights = {margin, rank_penalty, w_margin, w_rank, rank_temperature};
  Layout layout(sizes, &args.batch);
  layout.add(query, 1, &args.query);
  layout.add(positive, 1, &args.positive);
  layout.add(negative, 2, &args.negative);
  layout.add(mask, 1, &args.mask);
  layout.add(upstream, 0, &args.upstream);
  layout.finish();
  args.scratch = pointer(scratch);
  args.reward = pointer(reward);
  args.margin_reward = pointer(margin_reward);
  args.rank_reward = pointer(rank_reward);
  args.rank = pointer<int32_t>(rank);
  args.scores = pointer(scores);
  args.coefficients = pointer<double>(coefficients);
  args.grad_query = pointer(grad_query);
  args.grad_positive = pointer(grad_positive);
  args.grad_negative = pointer(grad_negative);
  run_released(elva_reward_forward_cuda, args);
}

void reward_backward(int dtype, int device, uintptr_t stream, py::handle sizes, int64_t negatives,
                     int64_t dim, py::handle query, py::handle positive, py::handle negative,
                     py::handle upstream, uintptr_t coefficients, uintptr_t grad_query,
                     uintptr_t grad_positive, uintptr_t grad_negative) {
  ElvaRewardArgs args = {};
  set_place(dtype, device, stream, &args);
  args.negatives = negatives;
  args.dim = dim;
  Layout layout(sizes, &args.batch);
  layout.add(query, 1, &args.query);
  layout.add(positive, 1, &args.positive);
  layout.add(negative, 2, &args.negative);
  layout.add(upstream, 0, &args.upstream);
  layout.finish();
  args.coefficients = pointer<double>(coefficients);
  args.grad_query = pointer(grad_query);
  args.grad_positive = pointer(grad_positive);
  args.grad_negative = pointer(grad_negative);
  run_released(elva_reward_backward_cuda, args);
}

int64_t search_scratch_bytes(int dtype, int64_t queries, int64_t rows, int64_t dim) {
  ElvaSearchArgs args = {};
  args.dtype = static_cast<ElvaDtype>(dtype);
  args.queries = queries;
  args.rows = rows;
  args.dim = dim;
  return elva_search_scratch_bytes_cuda(&args);
}

void search_scores(int dtype, int device, uintptr_t stream, int metric, int64_t queries,
                   int64_t rows, int64_t dim, py::handle query, py::handle corpus,
                   uintptr_t scratch, uintptr_t scores) {
  ElvaSearchArgs args = {};
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
  run_released(elva_search_scores_cuda, args);
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.def("cuda_reward_scratch_bytes", &scratch_bytes);
  module.def("cuda_reward_forward", &reward_forward);
  module.def("cuda_reward_backward", &reward_backward);
  module.def("cuda_search_scratch_bytes", &search_scratch_bytes);
  module.def("cuda_search_scores", &search_scores);
}

}  // namespace elva
