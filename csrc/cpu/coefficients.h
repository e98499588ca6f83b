// A candidate's gradient coefficients: what the grouped reward's forward leaves to its backward.
//
// Per group a[C], b[C] and the query's b, C = negatives + 1, for an upstream gradient of 1:
//   gradient row i = 2^-e (a q' + b c'), c' = c 2^-e; a = b = 0: a row of zeros
//   gradient of the query = 2^-f (sum of a c' + b q'), q' = q 2^-f
// They follow from ds/dc = (q^ - s c^) / |c| and ds/dq = (c^ - s q^) / |q|. A row in the range of
// rescale.h has e = 0; one that is not has the lowest bit of its a set (the query: of its b), and e
// is found again from the row.
#ifndef ELVA_CPU_COEFFICIENTS_H_
#define ELVA_CPU_COEFFICIENTS_H_

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace elva {

// Where the fast path neither overflows nor meets NaN.
inline bool moderate(double x) { return std::fabs(x) < 0x1p60; }

inline double marked(double x, bool mark) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  bits = (bits & ~uint64_t{1}) | (mark ? 1 : 0);
  memcpy(&x, &bits, sizeof(bits));
  return x;
}

inline bool is_marked(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return (bits & 1) != 0;
}

}  // namespace elva
#endif  // ELVA_CPU_COEFFICIENTS_H_
