// Why a launch failed, kept for each thread.
#include "../elva.h"

namespace elva {
namespace {

thread_local const char* device_error = "";

}  // namespace

void set_device_error(const char* what) { device_error = what; }

}  // namespace elva

extern "C" const char* elva_device_error(void) { return elva::device_error; }
