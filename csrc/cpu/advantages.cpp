// What: the advantage of each rollout over its group.
// Source: DeepSeekMath, arXiv:2402.03300, sec. 4.1; advantage (7) of elva_kernels.reference.
// In: reward [*, G] in bf16, fp16, fp32 or fp64, any strides.
// Out: advantages [*, G] in fp32 (fp64).
// Work split: some groups a thread; the deviation over all groups is one thread's.
// Bytes: rewards once, or four times for the deviation over all; advantages once.
// Numerics: double, sums in order, rewards above 2^400 over a power of two; a reward that is not finite makes its own group's advantages NaN
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

struct Range {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();

  template <class T>
  void add(const Row<T>& row, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
      low = std::min(low, to_double(row[i]));
      high = std::max(high, to_double(row[i]));
    }
  }

  // What rewards are multiplied by, a power of two, so that neither squares nor sums overflow.
  double scale() const {
    constexpr int kLargestExponent = 400;
    const double largest = std::max(-low, high);
    if (!(largest > 1)) return 1;
    return std::ldexp(1.0, std::min(0, kLargestExponent - 1 - std::ilogb(largest)));
  }
};

// In units of 1 / scale, as the mean and the squares of it.
template <class T>
double sum_of(const Row<T>& row, int64_t size, double scale) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += to_double(row[i]) * scale;
  return sum;
}

template <class T>
double squares_of(const Row<T>& row, int64_t size, double scale, double mean) {
  double squares = 0;
  for (int64_t i = 0; i < size; ++i) {
    const double deviation = to_double(row[i]) * scale - mean;
    squares += deviation * deviation;
  }
  return squares;
}

double deviation_of(double squares, int64_t count) {
  return std::sqrt(squares / static_cast<double>(std::max<int64_t>(1, count - 1)));
}

struct Deviation {
  double scale;
  double value;  // times scale
};

// Of all finite groups' rewards.
template <class T>
Deviation whole_deviation(const ElvaAdvantagesArgs& args) {
  const int64_t size = args.size;
  const auto each_sound = [&](const auto& visit) {
    for (int64_t g = 0; g < args.batch.groups; ++g) {
      const Row<T> row = group_row<T>(args, g);
      if (is_sound(row, size)) visit(row);
    }
  };
  Range range;
  each_sound([&](const Row<T>& row) { range.add(row, size); });
  const double scale = range.scale();
  double sum = 0, squares = 0;
  int64_t count = 0;
  each_sound([&](const Row<T>& row) {
    sum += sum_of(row, size, scale);
    count += size;
  });
  const double mean = sum / static_cast<double>(std::max<int64_t>(1, count));
  each_sound([&](const Row<T>& row) { squares += squares_of(row, size, scale, mean); });
  return {scale, deviation_of(squares, count)};
}

// `whole`: the deviation of all groups; null: of its own.
template <class T>
void one_group(const ElvaAdvantagesArgs& args, int64_t group, const Deviation* whole) {
  using V = typename ValueOf<T>::Type;
  const int64_t size = args.size;
  const Row<T> row = group_row<T>(args, group);
  V* out = static_cast<V*>(args.advantages) + group * size;
  if (!is_sound(row, size)) {
    std::fill(out, out + size, std::numeric_limits<V>::quiet_NaN());
    return;
  }
  Range range;
  range.add(row, size);
  if (range.high - range.low < args.same_reward) {
    std::fill(out, out + size, V(0));
    return;
  }
  const double scale = whole != nullptr ? whole->scale : range.scale();
  const double mean = sum_of(row, size, scale) / static_cast<double>(size);
  double divisor = scale;
  if (args.scale != ELVA_SCALE_NONE) {
    divisor =
        whole != nullptr ? whole->value : deviation_of(squares_of(row, size, scale, mean), size);
    divisor += args.std_eps * scale;
  }
  for (int64_t i = 0; i < size; ++i) {
    out[i] = static_cast<V>((to_double(row[i]) * scale - mean) / divisor);
  }
}

template <class T>
ElvaStatus run(const ElvaAdvantagesArgs& args) {
  constexpr int64_t kRewardsPerPiece = 8192;  // about 20 us
  Deviation of_all = {};
  const Deviation* whole = nullptr;
  if (args.scale == ELVA_SCALE_BATCH) {
    of_all = whole_deviation<T>(args);
    whole = &of_all;
  }
  parallel_for(args.batch.groups, std::max<int64_t>(1, kRewardsPerPiece / args.size), args.threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t g = begin; g < end; ++g) one_group<T>(args, g, whole);
               });
  return ELVA_OK;
}

}  // namespace
}  // namespace elva

extern "C" ElvaStatus elva_group_advantages_cpu(const ElvaAdvantagesArgs* args) {
  return elva::by_dtype(args->dtype,
                        [args](auto element) { return elva::run<decltype(element)>(*args); });
}
