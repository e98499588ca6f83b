// What sm_90 adds: copies of bulk data that arrive on a barrier, and blocks that write into each
// other's shared memory. For a host compiler: cuda_host.h (tests/kernels).
#ifndef ELVA_CUDA_CLUSTER_H_
#define ELVA_CUDA_CLUSTER_H_

#include "device.h"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace elva {

#ifdef __CUDACC__

// Rows of groups as the copy engine knows them, which loads all of a group's in one instruction.
struct RowBoxes {
  CUtensorMap map;
};

// Of `words` of 4 bytes a row; a box is `box_words` of each row of a group, zeros beyond the last.
// False where the engine cannot: strides in bytes, and what `data` is on, are multiples of 16.
inline bool describe_boxes(RowBoxes* boxes, const void* data, int64_t words, int64_t rows,
                           int64_t row_stride, int64_t groups, int64_t group_stride,
                           int64_t box_words) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &status);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
    const bool is_there = error == cudaSuccess && status == cudaDriverEntryPointSuccess;
    return reinterpret_cast<Encode>(is_there ? found : nullptr);
  }();
  constexpr int64_t kMostOfBox = 256;
  if (encode == nullptr || box_words > kMostOfBox || rows > kMostOfBox) return false;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(words), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(groups)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_stride),
                                static_cast<cuuint64_t>(group_stride)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_words), static_cast<cuuint32_t>(rows), 1};
  const cuuint32_t steps[] = {1, 1, 1};
  return encode(&boxes->map, CU_TENSOR_MAP_DATA_TYPE_INT32, 3, const_cast<void*>(data), sizes,
                strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// A barrier on which one thread arrives, with the number of bytes to wait for.
struct Arrivals {
  uint64_t word;

  __device__ void init() {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&word)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __device__ void expect(uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&word)),
        "r"(bytes)
        : "memory");
  }
  __device__ void wait(uint32_t parity) {
    uint32_t done = 0;
    while (done == 0) {
      asm volatile(
          "{ .reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(shared_address(&word)), "r"(parity)
          : "memory");
    }
  }
};

// Both addresses and the number of bytes are multiples of 16.
__device__ inline void bulk_load(void* shared, const void* global, uint32_t bytes,
                                 Arrivals* arrivals) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(&arrivals->word))
      : "memory");
}  // On sm_120 a copy to another block's memory is a call, which takes a stack.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define ELVA_OWN_SHARED "shared::cta"
#else
#define ELVA_OWN_SHARED "shared::cluster"
#endif

// The box of a group from `word` on, to `shared` on 128 bytes.
__device__ inline void box_load(void* shared, const RowBoxes* boxes, int word, int group,
                                Arrivals* arrivals) {
  asm volatile("cp.async.bulk.tensor.3d." ELVA_OWN_SHARED
               ".global.mbarrier::complete_tx::bytes [%0], "
               "[%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(shared)),
               "l"(boxes), "r"(word), "r"(0), "r"(group), "r"(shared_address(&arrivals->word))
               : "memory");
}

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline void cluster_sync() {
  __syncwarp();  // "aligned" wants a whole warp
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// *p of the block of that rank, p being where it lies in this block's shared memory; its bytes
// arrive on that block's `arrivals`.
__device__ inline void cluster_send(float2* p, uint32_t rank, float2 x, Arrivals* arrivals) {
  const auto there = [rank](const void* here) {
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(address)
                 : "r"(shared_address(here)), "r"(rank));
    return address;
  };
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          there(p)),
      "f"(x.x), "f"(x.y), "r"(there(&arrivals->word))
      : "memory");
}

#else

using host::Arrivals;
using host::box_load;
using host::bulk_load;
using host::cluster_rank;
using host::cluster_send;
using host::cluster_sync;
using host::describe_boxes;
using host::RowBoxes;

#endif

}  // namespace elva
#endif  // ELVA_CUDA_CLUSTER_H_
