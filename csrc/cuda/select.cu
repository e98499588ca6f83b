// What: the k first of each row of scores, and of those with the best of earlier columns.
// Source: the order of topk (15) and of the head (12) of elva_kernels.reference.
// In: scores [R, P] in fp32, any row stride and alignment; factors of rows and columns, or none;
//   the best so far.
// Out: best scores [R, k] in fp32 and their int64 indices: score descending, then index ascending.
// Work split: a block a part of a row, as many parts as fill the device; where there are several, a
//   block more a row for their lists.
// Bytes: the scores once, 64 to 128 bytes a thread on their way; a part's list of k keys twice.
// Numerics: comparisons of integers, which hold a score and its place: no two are equal, so any
//   order of the work gives the same list. Factors: two products in fp32. Deterministic.
// Limits: k <= ELVA_SELECT_MOST.
// Reference: elva_kernels.backends.gpu.topk.best_of.
#include "copies.h"

namespace elva {
namespace {

constexpr int kThreads = 256, kMost = ELVA_SELECT_MOST;
constexpr int kSlots = 1024;  // keys in shared memory: the k best, and those that wait for a sort
constexpr int kVectors = 4, kAtOnce = 4 * kVectors;       // of a thread in a round
constexpr int64_t kRound = int64_t{kVectors} * kThreads;  // vectors
static_assert(kMost <= kThreads && kMost + kThreads <= kSlots);

// Ours: enough blocks for the largest devices, and what one block merges in microseconds.
constexpr int64_t kEnoughBlocks = 528, kMostMerged = 16384;

// Integers above 0 in the order of the scores, -0 as 0.
__device__ inline uint32_t order_of(float score) {
  const float x = score + 0.0f;
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
constexpr uint32_t kLeastOrder = 0x007fffffu;  // of -inf
// -inf for what is below all scores.
__device__ inline float score_of(uint32_t order) {
  if (order < kLeastOrder) return -INFINITY;
  const uint32_t bits = order & 0x80000000u ? order & 0x7fffffffu : ~order;
  float score;
  memcpy(&score, &bits, sizeof(score));
  return score;
}
// Unique; greater for what comes first. 0 is nothing's.
__device__ inline uint64_t key_of(float score, uint32_t place) {
  return uint64_t{order_of(score)} << 32 | static_cast<uint32_t>(~place);
}

// Keys in shared memory, a power of two, in descending order. On all threads, which have met before;
// they meet at the end. Strides of up to 32 stay within what a warp holds.
__device__ inline void sort(uint64_t* keys, int count) {
  int before = 2 * 32;
  for (int size = 2; size <= count; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      if (stride > 32 || before > 32) {
        __syncthreads();
      } else {
        __syncwarp();
      }
      before = stride;
      for (int i = static_cast<int>(threadIdx.x); i < count / 2; i += kThreads) {
        const int low = 2 * i - (i & (stride - 1)), high = low + stride;
        const uint64_t first = keys[low], second = keys[high];
        if ((first < second) == ((low & size) == 0)) keys[low] = second, keys[high] = first;
      }
    }
  }
  __syncthreads();
}

struct Shared {
  Vector<float> staged[2][kVectors][kThreads];  // scores of this round and of the next
  uint64_t keys[kSlots];  // the k best, then others in any order, 0 where there is none
  int others;
};

// The best keys of those that a block has added. Every function is called by all its threads.
class Best {
 public:
  // kept(i): the keys that are there from the beginning, in order, 0 after the last.
  // low: at least 1; keys below are not wanted.
  // few: no more will be added than have room beside those kept.
  template <class Kept>
  __device__ Best(Shared* shared, int k, bool few, uint64_t low, const Kept& kept)
      : shared_(shared), k_(k), is_first_(!few && low == 1), low_(low) {
    for (int i = static_cast<int>(threadIdx.x); i < kSlots; i += kThreads) {
      shared->keys[i] = i < k ? kept(i) : 0;
    }
    if (threadIdx.x == 0) shared->others = 0;
    __syncthreads();
  }

  // A key below is not among the best, whatever comes.
  __device__ uint64_t low() const { return low_; }
  __device__ float low_score() const { return score_of(static_cast<uint32_t>(low_ >> 32)); }

  // Adds this thread's key(i) for every bit i of `wanted`.
  template <class Key>
  __device__ void add(uint32_t wanted, const Key& key) {
    if (is_first_) raise_to_largest(wanted, key);
    is_first_ = false;
    while (true) {
      wanted = appended(wanted, key);
      if (__syncthreads_or(wanted != 0) == 0) return;
      settle();
      raise_to_largest(wanted, key);
    }
  }

  // The k best come first among the keys, in order.
  __device__ void settle() {
    const int others = shared_->others < kSlots - k_ ? shared_->others : kSlots - k_;
    if (others == 0) return;
    int count = 64;
    while (count < k_ + others) count *= 2;
    sort(shared_->keys, count);
    raise(shared_->keys[k_ - 1] + 1);
    __syncthreads();
    for (int i = k_ + static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      shared_->keys[i] = 0;
    }
    if (threadIdx.x == 0) shared_->others = 0;
    __syncthreads();
  }

 private:
  __device__ void raise(uint64_t low) { low_ = low > low_ ? low : low_; }

  // k threads have a key from here on. Needs the room of the others, which is empty.
  template <class Key>
  __device__ void raise_to_largest(uint32_t wanted, const Key& key) {
    uint64_t largest = 0;
    for (uint32_t left = wanted; left != 0; left &= left - 1) {
      const uint64_t own = key(__ffs(static_cast<int>(left)) - 1);
      largest = own > largest ? own : largest;
    }
    uint64_t* spare = shared_->keys + k_;
    spare[threadIdx.x] = largest;
    sort(spare, kThreads);
    raise(spare[k_ - 1]);
    __syncthreads();
    spare[threadIdx.x] = 0;
    __syncthreads();
  }

  // Of those not below `low` all, or none where there is no room; which then are left.
  template <class Key>
  __device__ uint32_t appended(uint32_t wanted, const Key& key) {
    for (uint32_t left = wanted; left != 0; left &= left - 1) {
      if (key(__ffs(static_cast<int>(left)) - 1) < low_) wanted &= ~(left & (0 - left));
    }
    if (wanted == 0) return 0;
    const int count = __popc(wanted), first = atomicAdd(&shared_->others, count);
    if (first + count > kSlots - k_) return wanted;
    uint64_t* to = shared_->keys + k_ + first;
    for (uint32_t left = wanted; left != 0; left &= left - 1) {
      *to++ = key(__ffs(static_cast<int>(left)) - 1);
    }
    return 0;
  }

  Shared* shared_;
  int k_;
  bool is_first_;
  uint64_t low_;
};

struct SelectArgs {
  ElvaSelectArgs select;
  int64_t parts, part_vectors;
  uint64_t* lists;  // [rows, parts, k] keys
};

// A place: that of one kept so far, or `kept` and the column.
__device__ inline uint64_t kept_key(const ElvaSelectArgs& select, int64_t row, int i) {
  return i < select.kept ? key_of(select.best[row * select.k + i], static_cast<uint32_t>(i)) : 0;
}

// Keys of later columns below it are not among the k best.
__device__ inline uint64_t kept_low(const ElvaSelectArgs& select, int64_t row) {
  return kept_key(select, row, static_cast<int>(select.k) - 1) + 1;
}

// What the block's first keys stand for.
__device__ inline void write(const ElvaSelectArgs& select, int64_t row, const uint64_t* keys) {
  const int i = static_cast<int>(threadIdx.x);
  float score = -INFINITY;
  int64_t index = -1;
  if (i < select.k && keys[i] != 0) {
    const int64_t place = static_cast<uint32_t>(~keys[i]);
    score = score_of(static_cast<uint32_t>(keys[i] >> 32));
    index = place < select.kept ? select.index[row * select.k + place]
                                : select.first_index + place - select.kept;
    if (select.finite && score == -INFINITY) index = -1;
  }
  __syncthreads();  // those kept have been read
  if (i < select.k) {
    select.best[row * select.k + i] = score;
    select.index[row * select.k + i] = index;
  }
}

// A part of a row of scores, by vectors on 16 bytes: the row begins within the first of them.
class Part {
 public:
  __device__ explicit Part(const SelectArgs& args)
      : select_(args.select),
        row_(blockIdx.x / args.parts),
        scores_(select_.scores + row_ * select_.row_stride),
        ahead_(static_cast<int>(reinterpret_cast<uintptr_t>(scores_) / sizeof(float) % 4)) {
    const int64_t vectors = (select_.columns + ahead_ + 3) / 4;
    first_ = blockIdx.x % args.parts * args.part_vectors;
    last_ = first_ + args.part_vectors < vectors ? first_ + args.part_vectors : vectors;
  }
  __device__ int64_t row() const { return row_; }
  __device__ int64_t first() const { return first_; }
  __device__ int64_t last() const { return last_; }
  // Of the first of this thread's vectors.
  __device__ int64_t column(int64_t round, int v) const {
    return 4 * (round + v * kThreads + threadIdx.x) - ahead_;
  }

  // This thread's vectors from `round` on, on their way to where they wait; NaN where there is none.
  __device__ void fetch(int64_t round, Vector<float> (*staged)[kThreads]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t from = column(round, v);
      if (is_whole(from)) {
        copy16(&staged[v][threadIdx.x], scores_ + from);
      } else {
        staged[v][threadIdx.x] = edge(scores_, from, nanf(""));
      }
    }
  }

  // See ElvaSelectArgs.
  __device__ void scale(int64_t round, float* values) const {
    const float row = select_.row_factor[row_];
    if (select_.unit_columns && row == 1) return;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t from = column(round, v);
      const float* own = select_.column_factor + from;
      const Vector<float> factors = is_whole(from) && reinterpret_cast<uintptr_t>(own) % 16 == 0
                                        ? load16(own)
                                        : edge(select_.column_factor, from, -1);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& value = values[4 * v + i];
        const float factor = factors.at[i];
        if (factor < 0) continue;
        value = isnan(row) ? -INFINITY
                           : fminf(fmaxf(value * factor * row, -select_.limit), select_.limit);
      }
    }
  }

 private:
  __device__ bool is_whole(int64_t column) const {
    return column >= 0 && column + 4 <= select_.columns && column + ahead_ < 4 * last_;
  }
  // Four of a row's from a column on, `none` beyond its ends and the part's.
  __device__ Vector<float> edge(const float* row, int64_t column, float none) const {
    Vector<float> x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = column + i;
      x.at[i] = at >= 0 && at < select_.columns && at + ahead_ < 4 * last_ ? row[at] : none;
    }
    return x;
  }

  const ElvaSelectArgs& select_;
  int64_t row_;
  const float* scores_;
  int ahead_;
  int64_t first_, last_;
};

template <bool kScaled>
__global__ void __launch_bounds__(kThreads, kScaled ? 4 : 5)
    select_parts(const __grid_constant__ SelectArgs args) {
  ELVA_DYNAMIC_SHARED(memory);
  Shared* shared = reinterpret_cast<Shared*>(memory);
  const ElvaSelectArgs& select = args.select;
  const Part part(args);
  const int k = static_cast<int>(select.k);
  part.fetch(part.first(), shared->staged[0]);
  commit_copies();
  Best best(shared, k, 4 * (part.last() - part.first()) <= kSlots - k, kept_low(select, part.row()),
            [&](int i) {
              // Else select_merged has them.
              return args.parts == 1 ? kept_key(select, part.row(), i) : uint64_t{0};
            });
  int stage = 0;
#pragma unroll 1
  for (int64_t round = part.first(); round < part.last(); round += kRound) {
    Vector<float>(*staged)[kThreads] = shared->staged[stage];
    stage ^= 1;
    if (round + kRound < part.last()) part.fetch(round + kRound, shared->staged[stage]);
    commit_copies();
    wait_copies<1>();
    float values[kAtOnce];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const Vector<float> x = staged[v][threadIdx.x];
#pragma unroll
      for (int i = 0; i < 4; ++i) values[4 * v + i] = x.at[i];
    }
    if (kScaled) part.scale(round, values);
    const float low = best.low_score();
    uint32_t wanted = 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) wanted |= values[i] >= low ? 1u << i : 0u;
    if (kScaled && wanted != 0) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) staged[i / 4][threadIdx.x].at[i % 4] = values[i];
    }
    best.add(wanted, [&](int i) {
      const int64_t column = part.column(round, i / 4) + i % 4;
      return key_of(staged[i / 4][threadIdx.x].at[i % 4],
                    static_cast<uint32_t>(select.kept + column));
    });
  }
  wait_copies<0>();
  best.settle();
  if (args.parts == 1) {
    write(select, part.row(), shared->keys);
  } else if (threadIdx.x < k) {
    args.lists[static_cast<int64_t>(blockIdx.x) * k + threadIdx.x] = shared->keys[threadIdx.x];
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    select_merged(const __grid_constant__ SelectArgs args) {
  constexpr int kKeys = 8;
  ELVA_DYNAMIC_SHARED(memory);
  Shared* shared = reinterpret_cast<Shared*>(memory);
  const int64_t row = blockIdx.x, count = args.parts * args.select.k;
  const int k = static_cast<int>(args.select.k);
  const uint64_t* lists = args.lists + row * count;
  Best best(shared, k, count <= kSlots - k, kept_low(args.select, row),
            [&](int i) { return kept_key(args.select, row, i); });
#pragma unroll 1
  for (int64_t round = 0; round < count; round += kKeys * kThreads) {
    const auto key = [&](int i) {
      const int64_t at = round + i * kThreads + threadIdx.x;
      return at < count ? lists[at] : uint64_t{0};
    };
    uint32_t wanted = 0;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) wanted |= key(i) >= best.low() ? 1u << i : 0u;
    best.add(wanted, key);
  }
  best.settle();
  write(args.select, row, shared->keys);
}

// How rows are split, where each may lie anywhere on 16 bytes; the bytes of the lists are given
// back.
int64_t split(const ElvaSelectArgs& select, SelectArgs* args) {
  const int64_t vectors = (select.columns + 3 + 3) / 4, rows = select.rows > 0 ? select.rows : 1;
  int64_t parts = (kEnoughBlocks + rows - 1) / rows;
  parts = parts < kMostMerged / select.k ? parts : kMostMerged / select.k;
  const int64_t each = (vectors + parts - 1) / parts;
  args->select = select;
  args->part_vectors = (each + kRound - 1) / kRound * kRound;
  args->parts = (vectors + args->part_vectors - 1) / args->part_vectors;
  args->lists = static_cast<uint64_t*>(select.scratch);
  return args->parts == 1 ? 0
                          : rows * args->parts * select.k * static_cast<int64_t>(sizeof(uint64_t));
}

}  // namespace
}  // namespace elva

extern "C" {

int64_t elva_select_scratch_bytes_cuda(int64_t rows, int64_t columns, int64_t k) {
  ElvaSelectArgs select = {};
  select.rows = rows;
  select.columns = columns;
  select.k = k;
  elva::SelectArgs args;
  return elva::split(select, &args);
}

ElvaStatus elva_select_cuda(const ElvaSelectArgs* select) {
  using namespace elva;
  if (select->k < 1 || select->k > kMost) return ELVA_UNSUPPORTED;
  if (select->columns < 1 || select->columns + select->kept >= UINT32_MAX) return ELVA_UNSUPPORTED;
  const OnDevice there(select->device);
  ElvaStatus status = status_of(there.error());
  if (status != ELVA_OK) return status;
  SelectArgs args;
  split(*select, &args);
  const bool is_scaled = select->column_factor != nullptr;
  status = launch(is_scaled ? select_parts<true> : select_parts<false>, select->rows * args.parts,
                  0, kThreads, sizeof(Shared), select->stream, args);
  if (status != ELVA_OK || args.parts == 1) return status;
  return launch(select_merged, select->rows, 0, kThreads, sizeof(Shared), select->stream, args);
}

}  // extern "C"
