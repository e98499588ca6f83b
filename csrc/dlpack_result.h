// A large result on its way to Python: a block in DLPack's clothes.
#ifndef ELVA_DLPACK_RESULT_H_
#define ELVA_DLPACK_RESULT_H_

#include <stdint.h>

#include "elva.h"

namespace {

// DLPack, as far as a dense result needs it (https://dmlc.github.io/dlpack): the way for memory
// that is not torch's into a tensor, which gives it back without the interpreter.
struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

struct Result {
  DLManagedTensor managed;
  ElvaBlock block;
  int64_t shape[ELVA_MAX_DIMS + 2];
};

void release(DLManagedTensor* managed) {
  Result* result = static_cast<Result*>(managed->context);
  elva_release_block(&result->block);
  delete result;
}

}  // namespace
#endif  // ELVA_DLPACK_RESULT_H_
