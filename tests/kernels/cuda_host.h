// Runs the bodies of CUDA kernels on the host, for tests: a fiber a thread, one cluster of blocks
// after another, in an order that a test chooses. Blocks have shared memory of exactly the size
// they asked for, full of NaN at first. Bulk copies happen late and in any order, those of 16 bytes
// when they are waited for; the sanitizers see all accesses. What it does not show: memory ordering
// between fences, and timing.
#ifndef ELVA_TESTS_CUDA_HOST_H_
#define ELVA_TESTS_CUDA_HOST_H_

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__
#define ELVA_DYNAMIC_SHARED(name) unsigned char* const name = host::shared_memory()

struct float2 {
  float x, y;
};
struct double2 {
  double x, y;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1) : x(x), y(1), z(1) {}
};

// The runtime, as far as launches need it.
struct Stream;
using cudaStream_t = Stream*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaFuncAttributeMaxDynamicSharedMemorySize
};
enum { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace host {

float from_bf16(uint16_t bits);
float from_fp16(uint16_t bits);
uint16_t to_bf16(double x);
uint16_t to_fp16(double x);

// The fiber that runs.
struct Self {
  dim3 thread, block, block_dim, grid_dim;
};
const Self& self();
unsigned char* shared_memory();
void sync_block();
void sync_warp();
// Whether x is not 0 on any thread of the block, or lane of the warp.
int sync_block_or(int x);
int sync_warp_or(int x);
// What the lane of that number, or that distance, of this lane's warp gave.
uint64_t exchange(uint64_t x, int lane_mask);
uint64_t take(uint64_t x, int lane);
// As the matrix instruction: see multiply.h.
void multiply_add(float* sum, const uint32_t* a, const uint32_t* b, bool bf16);
void multiply_add(int32_t* sum, const uint32_t* a, const uint32_t* b);
int capability();
int most_shared();  // bytes of a block
cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& body);

// A barrier on which one thread arrives, with the number of bytes to wait for.
struct Arrivals {
  int32_t pending;
  uint32_t phase;

  void init() { pending = 0, phase = 0; }
  void expect(uint32_t bytes);
  void wait(uint32_t parity);
};
void copy16(void* shared, const void* global, int bytes);
void commit_copies();
void wait_copies(int pending);
void bulk_load(void* shared, const void* global, uint32_t bytes, Arrivals* arrivals);
// As cluster.h.
struct RowBoxes {
  const unsigned char* data;
  int64_t words, rows, row_stride, group_stride, box_words;
};
bool describe_boxes(RowBoxes* boxes, const void* data, int64_t words, int64_t rows,
                    int64_t row_stride, int64_t groups, int64_t group_stride, int64_t box_words);
void box_load(void* shared, const RowBoxes* boxes, int word, int group, Arrivals* arrivals);
uint32_t cluster_rank();
void cluster_sync();
void cluster_send(float2* p, uint32_t rank, float2 x, Arrivals* arrivals);

}  // namespace host

namespace host {

// threadIdx.x and the like, of the fiber that runs.
template <dim3 Self::* kMember>
struct Index {
  struct {
    operator unsigned() const { return (self().*kMember).x; }
  } x;
};

}  // namespace host

constexpr host::Index<&host::Self::thread> threadIdx{};
constexpr host::Index<&host::Self::block> blockIdx{};
constexpr host::Index<&host::Self::block_dim> blockDim{};
constexpr host::Index<&host::Self::grid_dim> gridDim{};

inline void __syncthreads() { host::sync_block(); }
inline int __syncthreads_or(int x) { return host::sync_block_or(x); }
inline void __syncwarp() { host::sync_warp(); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
// A fiber does not stop within it.
inline int atomicAdd(int* p, int x) {
  const int before = *p;
  *p = before + x;
  return before;
}

template <class V>
V __shfl_xor_sync(unsigned, V x, int lane_mask) {
  static_assert(sizeof(V) <= 8);
  uint64_t word = 0;
  memcpy(&word, &x, sizeof(x));
  word = host::exchange(word, lane_mask);
  memcpy(&x, &word, sizeof(x));
  return x;
}

inline int __all_sync(unsigned, int x) { return host::sync_warp_or(x == 0) == 0; }

template <class V>
V __shfl_sync(unsigned, V x, int lane) {
  static_assert(sizeof(V) <= 8);
  uint64_t word = 0;
  memcpy(&word, &x, sizeof(x));
  word = host::take(word, lane);
  memcpy(&x, &word, sizeof(x));
  return x;
}

inline double rsqrt(double x) { return 1 / sqrt(x); }

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "unspecified launch failure";
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  const bool of_memory = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin;
  *value = of_memory ? host::most_shared() : host::capability();
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, int, int bytes) {
  return bytes <= host::most_shared() ? cudaSuccess : cudaErrorLaunchFailure;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t*) {
  *clusters = 2;
  return cudaSuccess;
}
template <class Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args),
                               const Args& args) {
  return host::launch(*config, [&] { kernel(args); });
}

#endif  // ELVA_TESTS_CUDA_HOST_H_
