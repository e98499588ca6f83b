// The CPU levels: what *_simd.cpp is compiled for, once each, with ELVA_LEVEL set to the level's
// number (setup.py), and what ELVA_KERNELS_CPU_LEVEL may name.
#ifndef ELVA_CPU_LEVELS_H_
#define ELVA_CPU_LEVELS_H_

#define ELVA_LEVEL_PLAIN 0
#define ELVA_LEVEL_NEON 1
#define ELVA_LEVEL_NEONDOT 2
#define ELVA_LEVEL_AVX2 3
#define ELVA_LEVEL_AVX512 4
#define ELVA_LEVEL_AVX512BF16 5
#define ELVA_LEVEL_AMX 6

// X(number, name) for each level of this processor family, in ascending order. A build that needs
// fewer, such as a sanitizer's, defines it and compiles those alone.
#if defined(ELVA_EACH_LEVEL)
#elif defined(__x86_64__)
#define ELVA_EACH_LEVEL(X)     \
  X(ELVA_LEVEL_PLAIN, "plain") \
  X(ELVA_LEVEL_AVX2, "avx2")   \
  X(ELVA_LEVEL_AVX512, "avx512") X(ELVA_LEVEL_AVX512BF16, "avx512bf16") X(ELVA_LEVEL_AMX, "amx")
#elif defined(__aarch64__)
#define ELVA_EACH_LEVEL(X) \
  X(ELVA_LEVEL_PLAIN, "plain") X(ELVA_LEVEL_NEON, "neon") X(ELVA_LEVEL_NEONDOT, "neondot")
#else
#define ELVA_EACH_LEVEL(X) X(ELVA_LEVEL_PLAIN, "plain")
#endif

#endif  // ELVA_CPU_LEVELS_H_
