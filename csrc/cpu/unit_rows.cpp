// What: unit rows for the in-batch ops, and the gradient through them.
// Source: cosines (1) and (8) of elva_kernels.reference; dx = (g
//   - u (u . g)) / |x|.
// In: rows [R, D] in bf16, fp16, fp32 or fp64, any strides; gradients on unit rows in fp32 (fp64).
// Out: dense unit rows in fp32 (fp64), or rows of bf16 as they are; norms double [R, 2]; gradients
//   in the rows' dtype.
// Work split: some rows a thread.
// Bytes: each row twice from the caches, its unit row once.
// Numerics: double; fp64 rows are scaled by a power of two first; one rounding. A row that is not
//   finite becomes zeros with a norm of NaN, a zero row has an inverse norm of 0. Deterministic.
// Limits: D of 1 or more.
// Reference: elva_kernels.reference._unit.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "../elva_in_batch.h"
#include "kernels.h"
#include "lane_sums.h"
#include "numeric.h"
#include "parallel.h"
#include "rescale.h"
#include "row_layout.h"

namespace elva {
namespace {

constexpr int64_t kElementsPerPiece = 1 << 14;  // about 10 us

// x 2^exponent, for an exponent whose power alone may leave the range.
double scaled(double x, int exponent) {
  const int first = exponent / 2;
  return ldexp(ldexp(x, first), exponent - first);
}

template <class T>
int exponent_of(const Row<T>& row, int64_t dim) {
  if constexpr (!std::is_same_v<T, double>) return 0;  // their squares lie in double's range
  double largest = 0;
  for (int64_t i = 0; i < dim; ++i) largest = std::max(largest, std::fabs(to_double(row[i])));
  int exponent = 0;
  if (std::isfinite(largest)) frexp(largest, &exponent);
  return exponent;
}

double square_of(const Kernels& kernels, const Bf16* row, int64_t dim) {
  double dot, square;
  const void* rows[] = {row};
  kernels.dots[ELVA_BF16]({row, rows, 1, dim, &dot, &square});
  return square;
}

// norm[0]: 1 / |x 2^-e| (0 for a zero row, NaN for one that is not finite); norm[1]: e.
template <class T, class V>
void unit_row(const Row<T>& row, int64_t dim, V* out, double* norm) {
  const int exponent = exponent_of(row, dim);
  const auto at = [&](int64_t i) {
    const double x = to_double(row[i]);
    return exponent == 0 ? x : scaled(x, -exponent);
  };
  const double square = sum_of(dim, [&](int64_t i) {
    const double x = at(i);
    return x * x;
  });
  norm[1] = exponent;
  if (!std::isfinite(square) || square == 0) {
    norm[0] = square == 0 ? 0.0 : NAN;
    std::fill(out, out + dim, V(0));
    return;
  }
  const double root = std::sqrt(square);
  norm[0] = 1 / root;
  if constexpr (std::is_same_v<V, float>) {
    for (int64_t i = 0; i < dim; ++i) out[i] = static_cast<V>(at(i) * norm[0]);
  } else {
    for (int64_t i = 0; i < dim; ++i) out[i] = at(i) / root;
  }
}

// A bf16 row as it is, or as near to 1 as a power of two brings it where its squares would leave
// the range of a float; norm as in unit_row.
void bf16_row(const Kernels& kernels, const Row<Bf16>& row, int64_t dim, Bf16* out, double* norm) {
  if (row.stride == 1) {
    memcpy(out, row.data, static_cast<size_t>(dim) * sizeof(Bf16));
  } else {
    pack(row, dim, out);
  }
  int exponent = 0;
  double square = square_of(kernels, out, dim);
  if (!in_range<Bf16>(square)) {
    const RowKind kind = inspect(row, dim, &exponent);
    if (kind == RowKind::kFinite) {
      pack_scaled(row, dim, exponent, out);
      square = square_of(kernels, out, dim);
    } else {
      std::fill(out, out + dim, Bf16{});
      square = kind == RowKind::kZero ? 0.0 : NAN;
    }
  }
  norm[0] = square == 0 ? 0.0 : 1 / std::sqrt(square);
  norm[1] = exponent;
}

template <class T, class V>
void gradient_row(const V* unit, const V* grad, const double* norm, int64_t dim, T* out) {
  if (!(norm[0] != 0)) {
    for (int64_t i = 0; i < dim; ++i) from_double(0.0, out + i);
    return;
  }
  const double dot = sum_of(
      dim, [&](int64_t i) { return static_cast<double>(unit[i]) * static_cast<double>(grad[i]); });
  const int exponent = static_cast<int>(norm[1]);
  for (int64_t i = 0; i < dim; ++i) {
    const double x = (static_cast<double>(grad[i]) - static_cast<double>(unit[i]) * dot) * norm[0];
    from_double(exponent == 0 ? x : scaled(x, -exponent), out + i);
  }
}

int64_t grain(int64_t dim) { return std::max<int64_t>(1, kElementsPerPiece / dim); }

template <class T>
ElvaStatus unit_rows(const ElvaUnitRowsArgs& args) {
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) return ELVA_BAD_LEVEL;
  using V = typename ValueOf<T>::Type;
  const T* rows = static_cast<const T*>(args.rows.data);
  parallel_for(args.count, grain(args.dim), args.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Row<T> row{rows + i * args.rows.row_stride, args.rows.stride};
      V* unit = static_cast<V*>(args.unit) + i * args.dim;
      if constexpr (std::is_same_v<T, float>) {
        if (row.stride == 1) {
          kernels->matrix->f32_unit(row.data, args.dim, unit, args.norm + 2 * i);
          continue;
        }
      }
      unit_row(row, args.dim, unit, args.norm + 2 * i);
    }
  });
  return ELVA_OK;
}

template <class T>
ElvaStatus gradients(const ElvaUnitGradientArgs& args) {
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) return ELVA_BAD_LEVEL;
  using V = typename ValueOf<T>::Type;
  parallel_for(args.count, grain(args.dim), args.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const V* unit = static_cast<const V*>(args.unit) + i * args.dim;
      const V* grad = static_cast<const V*>(args.grad_unit) + i * args.dim;
      const double* norm = args.norm + 2 * i;
      T* out = static_cast<T*>(args.grad_rows) + i * args.dim;
      if constexpr (std::is_same_v<T, float>) {
        kernels->matrix->f32_gradient(unit, grad, norm[0], args.dim, out);
      } else {
        gradient_row(unit, grad, norm, args.dim, out);
      }
    }
  });
  return ELVA_OK;
}

ElvaStatus bf16_rows(const ElvaUnitRowsArgs& args) {
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) return ELVA_BAD_LEVEL;
  const Bf16* rows = static_cast<const Bf16*>(args.rows.data);
  parallel_for(args.count, grain(args.dim), args.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Row<Bf16> row{rows + i * args.rows.row_stride, args.rows.stride};
      double* norm = args.norm + 2 * i;
      bf16_row(*kernels, row, args.dim, static_cast<Bf16*>(args.unit) + i * args.dim, norm);
      args.scale[i] = norm[0] == norm[0] ? static_cast<float>(norm[0]) : 0.0f;
    }
  });
  std::fill(args.scale + args.count, args.scale + args.width, 0.0f);
  return ELVA_OK;
}

ElvaStatus bf16_gradients(const ElvaUnitGradientArgs& args) {
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) return ELVA_BAD_LEVEL;
  const bool rounded = args.dtype == ELVA_BF16;
  const int64_t row_bytes = args.dim * (rounded ? sizeof(Bf16) : sizeof(float));
  parallel_for(args.count, grain(args.dim), args.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      char* out = static_cast<char*>(args.grad_rows) + i * row_bytes;
      const double* norm = args.norm + 2 * i;
      if (!(norm[0] != 0)) {
        memset(out, 0, static_cast<size_t>(row_bytes));
        continue;
      }
      kernels->matrix->bf16_gradient({static_cast<const Bf16*>(args.unit) + i * args.dim,
                                      static_cast<const float*>(args.grad_unit) + i * args.dim,
                                      args.dim, norm[0], static_cast<int>(norm[1]), rounded, out});
    }
  });
  return ELVA_OK;
}

ElvaStatus column_norm(const ElvaColumnNormArgs& args) {
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) return ELVA_BAD_LEVEL;
  const int64_t pieces = (args.dim - 1) / kColumnsOfNorms + 1;
  std::vector<float> largest(static_cast<size_t>(pieces));
  parallel_for(pieces, 1, args.threads, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t j = piece * kColumnsOfNorms;
      float sums[kColumnsOfNorms] = {};
      kernels->matrix->column_squares({static_cast<const Bf16*>(args.rows) + j, args.count,
                                       args.dim, std::min(kColumnsOfNorms, args.dim - j),
                                       args.scale, sums});
      largest[static_cast<size_t>(piece)] = *std::max_element(sums, sums + kColumnsOfNorms);
    }
  });
  const double square = *std::max_element(largest.begin(), largest.end());
  *args.norm = 1.01 * std::sqrt(square);  // the sums are of floats
  return ELVA_OK;
}

ElvaStatus add_rows(const ElvaAddRowsArgs& args) {
  const Kernels* kernels = chosen_kernels();
  if (kernels == nullptr) return ELVA_BAD_LEVEL;
  const Bf16* rows = static_cast<const Bf16*>(args.rows);
  // Each thread goes through all of them for its own rows of out.
  const int64_t share = (args.out_count - 1) / std::max(args.threads, 1) + 1;
  parallel_for(args.out_count, std::max(share, grain(args.dim)), args.threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = 0; i < args.count; ++i) {
                   const int64_t row = i / args.positives, target = args.target[i];
                   const int64_t into = args.into_targets ? target : row;
                   const int64_t from = args.into_targets ? row : target;
                   if (target < 0 || into < begin || into >= end) continue;
                   kernels->matrix->add_row(rows + from * args.dim,
                                            args.slope[i] * args.scale[from], args.dim,
                                            args.out + into * args.dim);
                 }
               });
  return ELVA_OK;
}

template <class S>
ElvaStatus exclusion(const ElvaExclusionArgs& args) {
  constexpr S kNone = -std::numeric_limits<S>::infinity();
  S* out = static_cast<S*>(args.exclusion);
  for (int64_t i = 0; i < args.count; ++i) out[i] = std::isnan(args.norm[2 * i]) ? kNone : S(0);
  std::fill(out + args.count, out + args.width, kNone);
  return ELVA_OK;
}

ElvaStatus spoil(const ElvaSpoilArgs& args) {
  for (int64_t i = 0; i < args.rows * args.positives; ++i) {
    const int64_t target = args.target[i];
    if (target == -1) continue;
    const bool there = target >= 0 && target < args.candidates;
    if (!there || std::isnan(args.candidate_norm[2 * target]))
      args.norm[i / args.positives * 2] = NAN;
  }
  return ELVA_OK;
}

}  // namespace
}  // namespace elva

extern "C" {

ElvaStatus elva_unit_rows_cpu(const ElvaUnitRowsArgs* args) {
  if (args->unit_dtype == ELVA_BF16) return elva::bf16_rows(*args);
  return elva::by_dtype(args->dtype,
                        [args](auto element) { return elva::unit_rows<decltype(element)>(*args); });
}

ElvaStatus elva_unit_gradient_cpu(const ElvaUnitGradientArgs* args) {
  if (args->unit_dtype == ELVA_BF16) return elva::bf16_gradients(*args);
  return elva::by_dtype(args->dtype,
                        [args](auto element) { return elva::gradients<decltype(element)>(*args); });
}

ElvaStatus elva_column_norm_cpu(const ElvaColumnNormArgs* args) {
  return elva::within_memory([args] { return elva::column_norm(*args); });
}

ElvaStatus elva_add_rows_cpu(const ElvaAddRowsArgs* args) { return elva::add_rows(*args); }

ElvaStatus elva_exclusion_cpu(const ElvaExclusionArgs* args) {
  return elva::by_value_dtype(
      args->dtype, [args](auto value) { return elva::exclusion<decltype(value)>(*args); });
}

ElvaStatus elva_spoil_cpu(const ElvaSpoilArgs* args) { return elva::spoil(*args); }

}  // extern "C"
