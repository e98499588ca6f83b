// The vectors of one CPU level, chosen by the macro ELVA_LEVEL that the build sets for each object
// of *_simd.cpp.
//
// F32 is 16 float lanes and F64 8 double lanes on every level: load (from any element type,
// unaligned), store, broadcast, add, sub, mul, div, fma(a, b, c) = a b + c, clamp(x, limit) to
// +-limit, exponent_of(x) = the float whose exponent field is x's lowest bits, add_to (double lanes
// += this), rounded (from double lanes), add_sums (four doubles += the sums of four vectors' lanes,
// each by one tree). A line is 64 bytes of elements in as many vectors as it takes, in an order of
// the level's own: load_line, store_line (rounded to nearest even), add_line and round_line (to and
// from doubles in the elements' order). All of it has internal linkage: an inline function that one
// level compiled with its own instructions could otherwise be the copy that the linker keeps for
// all levels.
#ifndef ELVA_CPU_SIMD_H_
#define ELVA_CPU_SIMD_H_

#include <stdint.h>
#include <string.h>

#include <limits>
#include <type_traits>

#include "levels.h"
#include "numeric.h"

// The tiles are in assembler, which the binutils beside older compilers do not read.
#if defined(__clang__) || __GNUC__ >= 11
#define ELVA_AMX_INSTRUCTIONS (ELVA_LEVEL >= ELVA_LEVEL_AMX)
#else
#define ELVA_AMX_INSTRUCTIONS 0
#endif
#define ELVA_NEON_INSTRUCTIONS (ELVA_LEVEL == ELVA_LEVEL_NEON || ELVA_LEVEL == ELVA_LEVEL_NEONDOT)
#define ELVA_BF16_INSTRUCTIONS (ELVA_LEVEL >= ELVA_LEVEL_AVX512BF16)

// Before a loop over vectors in an array: gcc leaves one rolled where a vector is four registers, and
// an array that is indexed by a variable stays in memory.
#if ELVA_NEON_INSTRUCTIONS && !defined(__clang__)
#define ELVA_UNROLL _Pragma("GCC unroll 16")
#else
#define ELVA_UNROLL
#endif

#if ELVA_LEVEL >= ELVA_LEVEL_AVX512
#include "simd_avx512.h"
#elif ELVA_LEVEL == ELVA_LEVEL_AVX2
#include "simd_avx2.h"
#elif ELVA_NEON_INSTRUCTIONS
#include "simd_neon.h"
#else
#include "simd_plain.h"
#endif

#endif  // ELVA_CPU_SIMD_H_
