// What sm_90 adds: copies of bulk data that arrive on a barrier, and blocks that write into each
// other's shared memory. For a host compiler: cuda_host.h (tests/kernels).
#ifndef ELVA_CUDA_CLUSTER_H_
#define ELVA_CUDA_CLUSTER_H_

#include "device.h"

namespace elva {

#ifdef __CUDACC__

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
using host::bulk_load;
using host::cluster_rank;
using host::cluster_send;
using host::cluster_sync;

#endif

}  // namespace elva
#endif  // ELVA_CUDA_CLUSTER_H_
