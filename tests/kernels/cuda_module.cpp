// The bindings of csrc/cuda over cuda_host: what elva_kernels.backends.cuda calls when there is no GPU.
#include "bindings.h"

extern "C" const char* elva_cpu_level_error(void) { return ""; }

PYBIND11_MODULE(cuda_host, module) { elva::bind_cuda(module); }
