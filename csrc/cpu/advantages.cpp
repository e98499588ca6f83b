// What: the advantage of each rollout over its group.
// Source: DeepSeekMath, arXiv:2402.03300, sec. 4.1; advantage (7) of elva_kernels.reference.
// In: reward [*, G] in bf16, fp16, fp32 or fp64, any strides.
// Out: advantages [*, G] in fp32 (fp64).
// Work split: some groups a thread; the deviation over all groups is one thread's.
// Bytes: rewards once, or three times for the deviation over all; advantages once.
// Numerics: double, sums in order; a reward that is not finite makes its own group's advantages NaN
//   and counts in no deviation. Deterministic.
// Limits: G of 1 or more, 8 leading dimensions that do not merge.
// Reference: elva_kernels.reference.group_advantages.
#include <algorithm>
#include <cmath>
#include <limits>

#include "numeric.h"
#include "parallel.h"
#include "row_layout.h"

namespace elva {
namespace {

template <class T>
Row<T> group_row(const ElvaAdvantagesArgs& args, int64_t group) {
  const GroupIndex index(args.batch, group);
  return {group_data<T>(args.batch, args.reward, index), args.reward.stride};
}

template <class T>
bool is_sound(const Row<T>& row, int64_t size) {
  for (int64_t i = 0; i < size; ++i)
    if (!std::isfinite(to_double(row[i]))) return false;
  return true;
}

template <class T>
double sum_of(const Row<T>& row, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += to_double(row[i]);
  return sum;
}

template <class T>
double squares_of(const Row<T>& row, int64_t size, double mean) {
  double squares = 0;
  for (int64_t i = 0; i < size; ++i) {
    const double deviation = to_double(row[i]) - mean;
    squares += deviation * deviation;
  }
  return squares;
}

double deviation_of(double squares, int64_t count) {
  return std::sqrt(squares / static_cast<double>(std::max<int64_t>(1, count - 1)));
}

// Of all finite groups' rewards.
template <class T>
double whole_deviation(const ElvaAdvantagesArgs& args) {
  const int64_t size = args.size;
  double sum = 0, squares = 0;
  int64_t count = 0;
  for (int64_t g = 0; g < args.batch.groups; ++g) {
    const Row<T> row = group_row<T>(args, g);
    if (!is_sound(row, size)) continue;
    sum += sum_of(row, size);
    count += size;
  }
  const double mean = sum / static_cast<double>(std::max<int64_t>(1, count));
  for (int64_t g = 0; g < args.batch.groups; ++g) {
    const Row<T> row = group_row<T>(args, g);
    if (is_sound(row, size)) squares += squares_of(row, size, mean);
  }
  return deviation_of(squares, count);
}

// `deviation`: of all groups; null: of its own.
template <class T>
void one_group(const ElvaAdvantagesArgs& args, int64_t group, const double* deviation) {
  using V = typename ValueOf<T>::Type;
  const int64_t size = args.size;
  const Row<T> row = group_row<T>(args, group);
  V* out = static_cast<V*>(args.advantages) + group * size;
  if (!is_sound(row, size)) {
    std::fill(out, out + size, std::numeric_limits<V>::quiet_NaN());
    return;
  }
  double low = to_double(row[0]), high = low;
  for (int64_t i = 1; i < size; ++i) {
    low = std::min(low, to_double(row[i]));
    high = std::max(high, to_double(row[i]));
  }
  if (high - low < args.same_reward) {
    std::fill(out, out + size, V(0));
    return;
  }
  const double mean = sum_of(row, size) / static_cast<double>(size);
  double divisor = 1;
  if (args.scale != ELVA_SCALE_NONE) {
    divisor = deviation != nullptr ? *deviation : deviation_of(squares_of(row, size, mean), size);
    divisor += args.std_eps;
  }
  for (int64_t i = 0; i < size; ++i) out[i] = static_cast<V>((to_double(row[i]) - mean) / divisor);
}

template <class T>
ElvaStatus run(const ElvaAdvantagesArgs& args) {
  constexpr int64_t kRewardsPerPiece = 8192;  // about 20 us
  double whole = 0;
  const double* deviation = nullptr;
  if (args.scale == ELVA_SCALE_BATCH) {
    whole = whole_deviation<T>(args);
    deviation = &whole;
  }
  parallel_for(args.batch.groups, std::max<int64_t>(1, kRewardsPerPiece / args.size), args.threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t g = begin; g < end; ++g) one_group<T>(args, g, deviation);
               });
  return ELVA_OK;
}

}  // namespace
}  // namespace elva

extern "C" ElvaStatus elva_group_advantages_cpu(const ElvaAdvantagesArgs* args) {
  return elva::by_dtype(args->dtype,
                        [args](auto element) { return elva::run<decltype(element)>(*args); });
}
