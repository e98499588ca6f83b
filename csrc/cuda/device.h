// What kernels need of the machine: elements, vectors of 16 bytes, sums over a warp, launches.
//
// Compiled by nvcc for a GPU, or by a host compiler for the tests, which run the bodies of kernels
// on fibers: there cuda_host.h (tests/kernels) stands in for the CUDA headers.
#ifndef ELVA_CUDA_DEVICE_H_
#define ELVA_CUDA_DEVICE_H_

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define ELVA_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#include "cuda_host.h"
#endif

#include "../elva.h"

namespace elva {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

#ifdef __CUDACC__
__device__ inline float widen(Bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ inline float widen(Fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline void narrow(float x, Bf16* out) {
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ inline void narrow(float x, Fp16* out) {
  out->bits = __half_as_ushort(__float2half_rn(x));
}
__device__ inline void narrow(double x, Bf16* out) {
  out->bits = __bfloat16_as_ushort(__double2bfloat16(x));
}
__device__ inline void narrow(double x, Fp16* out) {
  out->bits = __half_as_ushort(__double2half(x));
}
#else
inline float widen(Bf16 x) { return host::from_bf16(x.bits); }
inline float widen(Fp16 x) { return host::from_fp16(x.bits); }
inline void narrow(double x, Bf16* out) { out->bits = host::to_bf16(x); }
inline void narrow(double x, Fp16* out) { out->bits = host::to_fp16(x); }
inline void narrow(float x, Bf16* out) { out->bits = host::to_bf16(x); }
inline void narrow(float x, Fp16* out) { out->bits = host::to_fp16(x); }
#endif
__device__ inline float widen(float x) { return x; }
__device__ inline void narrow(float x, float* out) { *out = x; }
__device__ inline void narrow(double x, float* out) { *out = static_cast<float>(x); }

template <class T>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<Bf16> = true;

// 16 bytes, moved at once.
template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  T at[kSize];
};

// Elements of 1, 2 or 4 bytes, as a word.
template <class T>
__device__ inline uint32_t word_of(const Vector<T>& x, int word) {
  if constexpr (sizeof(T) == 2) {
    return x.at[2 * word].bits | static_cast<uint32_t>(x.at[2 * word + 1].bits) << 16;
  } else {
    uint32_t bits;
    memcpy(&bits, x.at + word * 4 / sizeof(T), sizeof(bits));
    return bits;
  }
}

template <class T>
__device__ inline Vector<T> load16(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}
// To global memory. In one instruction: the compiler's own stores of halves are four or eight.
template <class T>
__device__ inline void store16(T* p, const Vector<T>& x) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(word_of(x, 0)),
               "r"(word_of(x, 1)), "r"(word_of(x, 2)), "r"(word_of(x, 3))
               : "memory");
#else
  *reinterpret_cast<Vector<T>*>(p) = x;
#endif
}
// To shared memory.
template <class T>
__device__ inline void store16_shared(T* p, const Vector<T>& x) {
#ifdef __CUDACC__
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(p))),
               "r"(word_of(x, 0)), "r"(word_of(x, 1)), "r"(word_of(x, 2)), "r"(word_of(x, 3))
               : "memory");
#else
  *reinterpret_cast<Vector<T>*>(p) = x;
#endif
}

constexpr unsigned kAllLanes = 0xffffffffu;

// Of a warp's values, on every lane, by a tree: the same on every run.
template <class V>
__device__ inline V warp_sum(V x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}
__device__ inline float warp_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

template <class T>
__device__ inline const T* group_data(const ElvaBatch& batch, const ElvaInput& input,
                                      int64_t group) {
  int64_t offset = 0;
#pragma unroll 1  // divisions are long, and mostly there is one dimension
  for (int32_t i = batch.ndim - 1; i > 0; --i) {
    offset += group % batch.sizes[i] * input.batch_strides[i];
    group /= batch.sizes[i];
  }
  if (batch.ndim > 0) offset += group * input.batch_strides[0];
  return static_cast<const T*>(input.data) + offset;
}

// Why the last launch of this thread failed; see elva_device_error.
void set_device_error(const char* what);

inline ElvaStatus status_of(cudaError_t error) {
  if (error == cudaSuccess) return ELVA_OK;
  set_device_error(cudaGetErrorString(error));
  return ELVA_DEVICE_ERROR;
}

// The device in use, for a while: torch's notion of it is the same one.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

// Runs `function` with an element of the type that `dtype` names, on that device. Not for doubles.
template <class Function>
ElvaStatus on_device(ElvaDtype dtype, int32_t device, const Function& function) {
  const OnDevice there(device);
  const ElvaStatus status = status_of(there.error());
  if (status != ELVA_OK) return status;
  switch (dtype) {
    case ELVA_BF16:
      return function(Bf16());
    case ELVA_FP16:
      return function(Fp16());
    case ELVA_FP32:
      return function(float());
    default:
      return ELVA_UNSUPPORTED;
  }
}

// Of the device in use: compute capability 9.0 or later.
inline bool has_clusters() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 9;
}

template <class Args>
ElvaStatus prepare(void (*kernel)(Args), size_t shared) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared <= kWithoutAsking) return ELVA_OK;
  return status_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared)));
}

// Of blocks in clusters, of one block too; 0: of a kernel that knows no clusters.
struct LaunchConfig {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  LaunchConfig(int64_t blocks, int cluster, int threads, size_t shared, void* stream) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream);
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = cluster > 0 ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
};

// Of a block, on the device in use.
inline cudaError_t most_shared(int device, int* bytes) {
  return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// How many clusters the device in use runs at a time; 0 where a block has less memory. Asking takes longer than a launch, so each
// thread remembers some answers.
template <class Args>
ElvaStatus most_clusters(void (*kernel)(Args), int cluster, int threads, size_t shared,
                         int* clusters) {
  struct Answer {
    void (*kernel)(Args);
    size_t shared;
    int device, cluster, clusters;
  };
  constexpr int kAnswers = 16;
  static thread_local Answer answers[kAnswers] = {};
  static thread_local int next = 0;
  int device = 0;
  ElvaStatus status = status_of(cudaGetDevice(&device));
  if (status != ELVA_OK) return status;
  for (const Answer& answer : answers) {
    if (answer.kernel == kernel && answer.shared == shared && answer.device == device &&
        answer.cluster == cluster) {
      *clusters = answer.clusters;
      return ELVA_OK;
    }
  }
  int most = 0;
  status = status_of(most_shared(device, &most));
  if (status != ELVA_OK) return status;
  *clusters = 0;
  if (shared <= static_cast<size_t>(most)) {
    status = prepare(kernel, shared);
    if (status != ELVA_OK) return status;
    const LaunchConfig launch(cluster, cluster, threads, shared, nullptr);
    status = status_of(cudaOccupancyMaxActiveClusters(clusters, kernel, &launch.config));
    if (status != ELVA_OK) return status;
  }
  answers[next++ % kAnswers] = {kernel, shared, device, cluster, *clusters};
  return ELVA_OK;
}

// `kernel` on `blocks` blocks in clusters of `cluster` (as LaunchConfig), each with `shared` bytes of
// memory.
template <class Args>
ElvaStatus launch(void (*kernel)(Args), int64_t blocks, int cluster, int threads, size_t shared,
                  void* stream, const Args& args) {
  if (blocks == 0) return ELVA_OK;
  if (blocks > INT32_MAX) return ELVA_UNSUPPORTED;
  const ElvaStatus status = prepare(kernel, shared);
  if (status != ELVA_OK) return status;
  const LaunchConfig launch(blocks, cluster, threads, shared, stream);
  return status_of(cudaLaunchKernelEx(&launch.config, kernel, args));
}

}  // namespace elva
#endif  // ELVA_CUDA_DEVICE_H_
