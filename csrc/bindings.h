// What the bindings share: tensors as integers and tuples in, a status out as an exception.
#ifndef ELVA_BINDINGS_H_
#define ELVA_BINDINGS_H_

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "elva.h"

namespace py = pybind11;

namespace elva {

inline void raise_unless_ok(ElvaStatus status) {
  if (status == ELVA_OUT_OF_MEMORY) throw std::bad_alloc();
  if (status == ELVA_UNSUPPORTED)
    throw std::runtime_error("elva_kernels._C: no kernel takes these sizes or this dtype");
  if (status == ELVA_BAD_LEVEL) throw std::runtime_error(elva_cpu_level_error());
#ifdef ELVA_CUDA_ARCHS
  if (status == ELVA_DEVICE_ERROR)
    throw std::runtime_error(std::string("elva_kernels._C: the GPU said: ") + elva_device_error());
#endif
  if (status != ELVA_OK)
    throw std::runtime_error("elva_kernels._C: status " + std::to_string(status));
}

inline void check_tuple(PyObject* object, size_t size) {
  if (!PyTuple_Check(object) || static_cast<size_t>(PyTuple_GET_SIZE(object)) != size) {
    throw std::invalid_argument("elva_kernels._C: expected a tuple of " + std::to_string(size));
  }
}

inline int64_t integer(PyObject* tuple, size_t i) {
  const int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, static_cast<Py_ssize_t>(i)));
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

inline double number(PyObject* tuple, size_t i) {
  const double value = PyFloat_AsDouble(PyTuple_GET_ITEM(tuple, static_cast<Py_ssize_t>(i)));
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

// The one place that knows the order in which Python passes a reward's weights.
inline ElvaRewardWeights reward_weights(py::handle weights) {
  PyObject* tuple = weights.ptr();
  check_tuple(tuple, 5);
  return {number(tuple, 0), number(tuple, 1), number(tuple, 2), number(tuple, 3), number(tuple, 4)};
}

// Runs an op without the interpreter. Where the interpreter ends meanwhile, Python ends this thread
// in PyEval_RestoreThread by unwinding it: through no destructor (py::gil_scoped_release has one,
// and would terminate the process), and with no reference to a Python object to give back. That is
// why this file borrows all it is passed.
template <class Args>
void run_released(ElvaStatus (*op)(const Args*), const Args& args) {
  PyThreadState* state = PyEval_SaveThread();
  const ElvaStatus status = op(&args);
  PyEval_RestoreThread(state);
  raise_unless_ok(status);
}

constexpr size_t kMaxOperands = 5;

// Merges the leading dimensions `sizes` that every operand walks as one, and writes batch and batch
// strides. An operand is what Python passes for a tensor: (address, strides), or None for an absent
// one.
class Layout {
 public:
  Layout(py::handle sizes, ElvaBatch* batch) : batch_(batch), sizes_(sizes.ptr()) {
    ndim_ = static_cast<size_t>(PyTuple_Size(sizes_));
    check_tuple(sizes_, ndim_);
    batch->groups = 1;
    batch->ndim = 0;
    for (size_t i = 0; i < ndim_; ++i) batch->groups *= integer(sizes_, i);
  }

  // own: the dimensions of the operand itself, after the leading ones (0, 1 or 2).
  void add(py::handle operand, size_t own, ElvaInput* input) {
    if (operand.is_none()) return;
    check_tuple(operand.ptr(), 2);
    PyObject* strides = PyTuple_GET_ITEM(operand.ptr(), 1);
    check_tuple(strides, ndim_ + own);
    input->data = reinterpret_cast<const void*>(static_cast<uintptr_t>(integer(operand.ptr(), 0)));
    if (own >= 1) input->stride = integer(strides, ndim_ + own - 1);
    if (own == 2) input->row_stride = integer(strides, ndim_);
    strides_[count_] = strides;
    inputs_[count_++] = input;
  }

  void finish() {
    for (size_t i = 0; i < ndim_; ++i) {
      const int64_t size = integer(sizes_, i);
      if (size == 1) continue;
      if (batch_->ndim > 0 && merges(i, size)) {
        batch_->sizes[batch_->ndim - 1] *= size;
      } else {
        if (batch_->ndim == ELVA_MAX_DIMS) {
          throw std::invalid_argument(
              "more than 8 leading dimensions that do not merge; call contiguous() first");
        }
        batch_->sizes[batch_->ndim++] = size;
      }
      for (size_t k = 0; k < count_; ++k) {
        inputs_[k]->batch_strides[batch_->ndim - 1] = integer(strides_[k], i);
      }
    }
  }

 private:
  bool merges(size_t dimension, int64_t size) const {
    for (size_t k = 0; k < count_; ++k) {
      const int64_t inner = integer(strides_[k], dimension);
      if (inputs_[k]->batch_strides[batch_->ndim - 1] != inner * size) return false;
    }
    return true;
  }

  ElvaBatch* batch_;
  PyObject* sizes_;
  size_t ndim_;
  PyObject* strides_[kMaxOperands] = {};
  ElvaInput* inputs_[kMaxOperands] = {};
  size_t count_ = 0;
};

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// An operand [rows, dim].
inline void set_rows(py::handle operand, ElvaInput* input) {
  check_tuple(operand.ptr(), 2);
  PyObject* strides = PyTuple_GET_ITEM(operand.ptr(), 1);
  check_tuple(strides, 2);
  input->data = reinterpret_cast<const void*>(static_cast<uintptr_t>(integer(operand.ptr(), 0)));
  input->row_stride = integer(strides, 0);
  input->stride = integer(strides, 1);
}

// Where a reward runs: on a number of threads, or on (device, stream) with the scratch memory that
// its forward wants.
inline void set_place(py::handle place, ElvaRewardArgs* args) {
  if (!PyTuple_Check(place.ptr())) {
    args->threads = place.cast<int32_t>();
    return;
  }
  const auto size = static_cast<size_t>(PyTuple_GET_SIZE(place.ptr()));
  check_tuple(place.ptr(), size == 2 ? 2 : 3);
  args->device = static_cast<int32_t>(integer(place.ptr(), 0));
  args->stream = pointer(static_cast<uintptr_t>(integer(place.ptr(), 1)));
  if (size == 3) args->scratch = pointer(static_cast<uintptr_t>(integer(place.ptr(), 2)));
}

// What the reward's forward and backward have in common.
inline ElvaRewardArgs reward_args(int dtype, py::handle place, py::handle sizes, int64_t negatives,
                                  int64_t dim, py::handle query, py::handle positive,
                                  py::handle negative, py::handle mask, py::handle upstream,
                                  uintptr_t coefficients, uintptr_t grad_query,
                                  uintptr_t grad_positive, uintptr_t grad_negative) {
  ElvaRewardArgs args = {};
  args.dtype = static_cast<ElvaDtype>(dtype);
  set_place(place, &args);
  args.negatives = negatives;
  args.dim = dim;
  Layout layout(sizes, &args.batch);
  layout.add(query, 1, &args.query);
  layout.add(positive, 1, &args.positive);
  layout.add(negative, 2, &args.negative);
  layout.add(mask, 1, &args.mask);
  layout.add(upstream, 0, &args.upstream);
  layout.finish();
  args.coefficients = pointer<double>(coefficients);
  args.grad_query = pointer(grad_query);
  args.grad_positive = pointer(grad_positive);
  args.grad_negative = pointer(grad_negative);
  return args;
}

template <ElvaStatus (*op)(const ElvaRewardArgs*)>
void reward_forward(int dtype, py::handle place, py::handle sizes, int64_t negatives, int64_t dim,
                    py::handle query, py::handle positive, py::handle negative, py::handle mask,
                    py::handle upstream, py::handle weights, uintptr_t reward,
                    uintptr_t margin_reward, uintptr_t rank_reward, uintptr_t rank,
                    uintptr_t scores, uintptr_t coefficients, uintptr_t grad_query,
                    uintptr_t grad_positive, uintptr_t grad_negative) {
  ElvaRewardArgs args =
      reward_args(dtype, place, sizes, negatives, dim, query, positive, negative, mask, upstream,
                  coefficients, grad_query, grad_positive, grad_negative);
  args.weights = reward_weights(weights);
  args.reward = pointer(reward);
  args.margin_reward = pointer(margin_reward);
  args.rank_reward = pointer(rank_reward);
  args.rank = pointer<int32_t>(rank);
  args.scores = pointer(scores);
  run_released(op, args);
}

template <ElvaStatus (*op)(const ElvaRewardArgs*)>
void reward_backward(int dtype, py::handle place, py::handle sizes, int64_t negatives, int64_t dim,
                     py::handle query, py::handle positive, py::handle negative,
                     py::handle upstream, uintptr_t coefficients, uintptr_t grad_query,
                     uintptr_t grad_positive, uintptr_t grad_negative) {
  run_released(op, reward_args(dtype, place, sizes, negatives, dim, query, positive, negative,
                               py::handle(Py_None), upstream, coefficients, grad_query,
                               grad_positive, grad_negative));
}

// Adds the functions of csrc/cuda.
void bind_cuda(py::module_& module);

}  // namespace elva
#endif  // ELVA_BINDINGS_H_
