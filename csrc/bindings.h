// What the bindings share: tensors as integers and tuples in, a status out as an exception.
#ifndef ELVA_BINDINGS_H_
#define ELVA_BINDINGS_H_

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "elva.h"
#include "elva_in_batch.h"
#include "float_mode.h"

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

inline int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

inline double number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

inline PyObject* item(PyObject* tuple, size_t i) {
  return PyTuple_GET_ITEM(tuple, static_cast<Py_ssize_t>(i));
}

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline void* pointer(PyObject* object) { return pointer(static_cast<uintptr_t>(integer(object))); }

// The one place that knows the order in which Python passes a reward's weights.
inline ElvaRewardWeights reward_weights(py::handle weights) {
  PyObject* tuple = weights.ptr();
  check_tuple(tuple, 5);
  return {number(item(tuple, 0)), number(item(tuple, 1)), number(item(tuple, 2)),
          number(item(tuple, 3)), number(item(tuple, 4))};
}

template <class Args>
ElvaStatus in_default_float_mode(ElvaStatus (*op)(const Args*), const Args& args) {
  const DefaultFloatMode mode;
  return op(&args);
}

// Runs an op without the interpreter. Where the interpreter ends meanwhile, Python ends this thread
// in PyEval_RestoreThread by unwinding it: through no destructor (py::gil_scoped_release has one,
// and would terminate the process), and with no reference to a Python object to give back. That is
// why this file borrows all it is passed. Every op computes in the default float mode.
template <class Args>
void run_released(ElvaStatus (*op)(const Args*), const Args& args) {
  PyThreadState* state = PyEval_SaveThread();
  const ElvaStatus status = in_default_float_mode(op, args);
  PyEval_RestoreThread(state);
  raise_unless_ok(status);
}

constexpr size_t kMaxOperands = 6;

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
    for (size_t i = 0; i < ndim_; ++i) batch->groups *= integer(item(sizes_, i));
  }

  // own: the dimensions of the operand itself, after the leading ones (0, 1 or 2).
  void add(py::handle operand, size_t own, ElvaInput* input) {
    if (operand.is_none()) return;
    check_tuple(operand.ptr(), 2);
    PyObject* strides = item(operand.ptr(), 1);
    check_tuple(strides, ndim_ + own);
    input->data = pointer(item(operand.ptr(), 0));
    if (own >= 1) input->stride = integer(item(strides, ndim_ + own - 1));
    if (own == 2) input->row_stride = integer(item(strides, ndim_));
    strides_[count_] = strides;
    inputs_[count_++] = input;
  }

  void finish() {
    for (size_t i = 0; i < ndim_; ++i) {
      const int64_t size = integer(item(sizes_, i));
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
        inputs_[k]->batch_strides[batch_->ndim - 1] = integer(item(strides_[k], i));
      }
    }
  }

 private:
  bool merges(size_t dimension, int64_t size) const {
    for (size_t k = 0; k < count_; ++k) {
      const int64_t inner = integer(item(strides_[k], dimension));
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

// An operand [rows, dim].
inline ElvaInput rows_of(PyObject* operand) {
  check_tuple(operand, 2);
  PyObject* strides = item(operand, 1);
  check_tuple(strides, 2);
  ElvaInput input = {};
  input.data = pointer(item(operand, 0));
  input.row_stride = integer(item(strides, 0));
  input.stride = integer(item(strides, 1));
  return input;
}

// What Python passes, as whichever field of an args struct it is for.
struct Field {
  PyObject* object;

  template <class T>
  operator T() const {
    if constexpr (std::is_same_v<T, ElvaInput>) {
      return rows_of(object);
    } else if constexpr (std::is_same_v<T, ElvaRewardWeights>) {
      return reward_weights(object);
    } else if constexpr (std::is_pointer_v<T>) {
      return static_cast<T>(pointer(object));
    } else if constexpr (std::is_floating_point_v<T>) {
      return number(object);
    } else {
      return static_cast<T>(integer(object));
    }
  }
};

template <size_t>
using Handle = py::handle;

template <class Args, size_t... i>
auto takes(std::index_sequence<i...>)
    -> decltype(Args{(static_cast<void>(i), Field{})...}, std::true_type());
template <class Args>
std::false_type takes(...);

template <class Args, size_t count = 0>
constexpr size_t field_count() {
  if constexpr (decltype(takes<Args>(std::make_index_sequence<count + 1>()))::value) {
    return field_count<Args, count + 1>();
  } else {
    return count;
  }
}

template <class Args, size_t... i>
void bind(py::module_& module, const char* name, ElvaStatus (*op)(const Args*),
          std::index_sequence<i...>) {
  module.def(name, [op](Handle<i>... fields) { run_released(op, Args{Field{fields.ptr()}...}); });
}

// Adds an op whose Python function takes the fields of its args struct, in their order.
template <class Args>
void bind(py::module_& module, const char* name, ElvaStatus (*op)(const Args*)) {
  bind(module, name, op, std::make_index_sequence<field_count<Args>()>());
}

// Where a reward runs: on a number of threads, or on (device, stream) and, third, the scratch memory
// that its forward wants.
template <class Args>
void set_place(py::handle place, Args* args) {
  if (!PyTuple_Check(place.ptr())) {
    args->threads = static_cast<int32_t>(integer(place.ptr()));
    return;
  }
  const auto size = static_cast<size_t>(PyTuple_GET_SIZE(place.ptr()));
  check_tuple(place.ptr(), size == 2 ? 2 : 3);
  args->device = static_cast<int32_t>(integer(item(place.ptr(), 0)));
  args->stream = pointer(item(place.ptr(), 1));
  if constexpr (std::is_same_v<Args, ElvaRewardArgs>) {
    if (size == 3) args->scratch = pointer(item(place.ptr(), 2));
  }
}

// What the reward's forward and backward have in common. With an index `negative` is a bank.
inline ElvaRewardArgs reward_args(int dtype, py::handle place, py::handle sizes, int64_t negatives,
                                  int64_t dim, int64_t bank_rows, py::handle query,
                                  py::handle positive, py::handle negative, py::handle mask,
                                  py::handle index, py::handle upstream, uintptr_t coefficients,
                                  uintptr_t grad_query, uintptr_t grad_positive,
                                  uintptr_t grad_negative) {
  ElvaRewardArgs args = {};
  args.dtype = static_cast<ElvaDtype>(dtype);
  set_place(place, &args);
  args.negatives = negatives;
  args.dim = dim;
  args.bank_rows = bank_rows;
  if (!index.is_none()) args.negative = rows_of(negative.ptr());
  Layout layout(sizes, &args.batch);
  layout.add(query, 1, &args.query);
  layout.add(positive, 1, &args.positive);
  if (index.is_none()) layout.add(negative, 2, &args.negative);
  layout.add(mask, 1, &args.mask);
  layout.add(index, 1, &args.index);
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
                    int64_t bank_rows, py::handle query, py::handle positive, py::handle negative,
                    py::handle mask, uintptr_t relevance, py::handle index, py::handle upstream,
                    py::handle weights, uintptr_t reward, uintptr_t margin_reward,
                    uintptr_t rank_reward, uintptr_t rank, uintptr_t scores, uintptr_t coefficients,
                    uintptr_t grad_query, uintptr_t grad_positive, uintptr_t grad_negative) {
  ElvaRewardArgs args =
      reward_args(dtype, place, sizes, negatives, dim, bank_rows, query, positive, negative, mask,
                  index, upstream, coefficients, grad_query, grad_positive, grad_negative);
  args.relevance = pointer(relevance);
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
                     int64_t bank_rows, py::handle query, py::handle positive, py::handle negative,
                     py::handle index, py::handle upstream, uintptr_t coefficients,
                     uintptr_t grad_query, uintptr_t grad_positive, uintptr_t grad_negative) {
  run_released(op, reward_args(dtype, place, sizes, negatives, dim, bank_rows, query, positive,
                               negative, py::handle(Py_None), index, upstream, coefficients,
                               grad_query, grad_positive, grad_negative));
}

template <ElvaStatus (*op)(const ElvaBankGradientArgs*)>
void bank_gradient(int dtype, py::handle place, py::handle sizes, int64_t negatives, int64_t dim,
                   int64_t bank_rows, py::handle query, py::handle negative, py::handle upstream,
                   uintptr_t coefficients, uintptr_t order, uintptr_t first,
                   uintptr_t grad_negative) {
  ElvaBankGradientArgs args = {};
  args.dtype = static_cast<ElvaDtype>(dtype);
  set_place(place, &args);
  args.negatives = negatives;
  args.dim = dim;
  args.bank_rows = bank_rows;
  args.negative = rows_of(negative.ptr());
  Layout layout(sizes, &args.batch);
  layout.add(query, 1, &args.query);
  layout.add(upstream, 0, &args.upstream);
  layout.finish();
  args.coefficients = pointer<double>(coefficients);
  args.order = pointer<int64_t>(order);
  args.first = pointer<int64_t>(first);
  args.grad_negative = pointer(grad_negative);
  run_released(op, args);
}

// Adds the functions of csrc/cuda.
void bind_cuda(py::module_& module);

}  // namespace elva
#endif  // ELVA_BINDINGS_H_
