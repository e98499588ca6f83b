// Copies of 16 bytes from global to shared memory that go on while their thread does other things.
//
// A thread's copies come in groups: those since its last `commit_copies`. Another thread may read
// what they brought after the copying thread has waited and both have met at a barrier.
#ifndef ELVA_CUDA_COPIES_H_
#define ELVA_CUDA_COPIES_H_

#include "device.h"

namespace elva {

#ifdef __CUDACC__
// Of which `bytes` are read, the rest become zeros.
__device__ inline void copy16(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(bytes)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all groups but the last `kPending` are there.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
#else
inline void copy16(void* shared, const void* global, int bytes = 16) {
  host::copy16(shared, global, bytes);
}
inline void commit_copies() { host::commit_copies(); }
template <int kPending>
inline void wait_copies() {
  host::wait_copies(kPending);
}
#endif

}  // namespace elva
#endif  // ELVA_CUDA_COPIES_H_
