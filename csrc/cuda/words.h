// Vectors that wait in registers: as elements of 16 bits they would take a register for each.
#ifndef ELVA_CUDA_WORDS_H_
#define ELVA_CUDA_WORDS_H_

#include "device.h"

namespace elva {

using Words = Vector<uint32_t>;

template <class T>
__device__ inline Words words_at(const T* p) {
  return load16(reinterpret_cast<const uint32_t*>(p));
}

template <class T>
__device__ inline Vector<T> elements(const Words& x) {
  Vector<T> out;
  memcpy(&out, &x, sizeof(out));
  return out;
}

}  // namespace elva
#endif  // ELVA_CUDA_WORDS_H_
