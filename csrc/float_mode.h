// The calling thread's floating-point mode: rounding, and what becomes of subnormal numbers.
#ifndef ELVA_FLOAT_MODE_H_
#define ELVA_FLOAT_MODE_H_

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace elva {

#if defined(__SSE__)
constexpr uint64_t kDefaultFloatMode = 0x1f80;
inline uint64_t float_mode() { return _mm_getcsr(); }
inline void set_float_mode(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
constexpr uint64_t kDefaultFloatMode = 0;
inline uint64_t float_mode() {
  uint64_t mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_float_mode(uint64_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
constexpr uint64_t kDefaultFloatMode = 0;
inline uint64_t float_mode() { return kDefaultFloatMode; }
inline void set_float_mode(uint64_t) {}
#endif

// torch.set_flush_denormal, fesetround and other libraries change the calling thread's mode; bits
// must depend neither on it nor on which thread computes them.
class DefaultFloatMode {
 public:
  DefaultFloatMode() : saved_(float_mode()) { set_float_mode(kDefaultFloatMode); }
  ~DefaultFloatMode() { set_float_mode(saved_); }
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

 private:
  const uint64_t saved_;
};

}  // namespace elva
#endif  // ELVA_FLOAT_MODE_H_
