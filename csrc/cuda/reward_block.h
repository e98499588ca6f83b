// One group of the grouped reward at a time on a cluster of blocks: what a block's shared memory holds,
// and what the block does. For reward_cluster.cu.
#ifndef ELVA_CUDA_REWARD_BLOCK_H_
#define ELVA_CUDA_REWARD_BLOCK_H_

#include "cluster.h"
#include "reward_gradient.h"
#include "words.h"

namespace elva {

// Whether four rows of halves at a time spill too.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kIsTight = true;
#else
constexpr bool kIsTight = false;
#endif

struct ClusterArgs {
  RowBoxes negatives;  // where is_boxed
  ElvaRewardArgs reward;
  int64_t columns;
  int64_t clusters;
  int blocks;  // of a cluster
  int wide;    // vectors of a row whose gradients are formed at a time
  bool is_boxed;
};

// A block's shared memory, in order.
template <class T>
struct Layout {
  int64_t candidates, columns, blocks;

  // Of the rows, and of either half of the exchange; rows come on 128 bytes after them.
  static constexpr size_t kArrivals = 128;
  // The rows: the query's, then the candidates'.
  __host__ __device__ size_t tile() const {
    return static_cast<size_t>((candidates + 1) * columns) * sizeof(T);
  }
  __host__ __device__ size_t gradient() const {
    return gradient_shared<T>(candidates - 1, wide_of(columns / Vector<T>::kSize));
  }
  // A product and a square of the query and the candidates, from every block, twice.
  __host__ __device__ size_t exchange() const {
    return 2 * static_cast<size_t>(blocks * (candidates + 1)) * sizeof(float2);
  }
  __host__ __device__ size_t coefficients() const {
    return 2 * static_cast<size_t>(candidates) * sizeof(double);
  }
  __host__ __device__ size_t exponents() const {
    return static_cast<size_t>((candidates + 4) / 4 * 4) * sizeof(int);
  }
  size_t bytes() const {
    return kArrivals + tile() + gradient() + exchange() + coefficients() + exponents() +
           Group::bytes(candidates);
  }
};

// The columns of a group's rows at `at`, in the tile. Offsets are 32 bits of bytes: a group fits.
// kMarks: some rows may not have been read.
template <class T, bool kMarks>
class HeldRows {
 public:
  __device__ HeldRows(const ElvaRewardArgs& args, int64_t index, const T* tile, int columns,
                      int64_t at)
      : args_(args),
        tile_(reinterpret_cast<const unsigned char*>(tile)),
        row_bytes_(static_cast<uint32_t>(columns) * sizeof(T)),
        grad_row_bytes_(static_cast<uint32_t>(args.dim) * sizeof(T)),
        own_(index * args.dim + at),
        grad_negatives_(static_cast<unsigned char*>(args.grad_negative) +
                        (index * args.negatives * args.dim + at) * sizeof(T)) {}

  __device__ int64_t negatives() const { return args_.negatives; }
  __device__ Vector<T> read_query() const { return read(0); }
  __device__ Vector<T> read_positive() const { return read(1); }
  __device__ Vector<T> read_negative(int64_t n, bool is_wanted) const {
    return read(!kMarks || is_wanted ? static_cast<uint32_t>(n) + 2 : 0);
  }
  template <class V>
  __device__ void write_query(const V* gradient) const {
    if (args_.grad_query == nullptr) return;
    store16(static_cast<T*>(args_.grad_query) + own_, packed<T>(gradient));
  }
  template <class V>
  __device__ void write_positive(const V* gradient) const {
    if (args_.grad_positive == nullptr) return;
    store16(static_cast<T*>(args_.grad_positive) + own_, packed<T>(gradient));
  }
  template <class V>
  __device__ void write_negative(int64_t n, const V* gradient) const {
    unsigned char* const to =
        grad_negatives_ + uint64_t{static_cast<uint32_t>(n)} * grad_row_bytes_;
    store16(reinterpret_cast<T*>(to), packed<T>(gradient));
  }

 private:
  __device__ Vector<T> read(uint32_t row) const {
    return load16(reinterpret_cast<const T*>(tile_ + row * row_bytes_));
  }

  const ElvaRewardArgs& args_;
  const unsigned char* tile_;
  uint32_t row_bytes_, grad_row_bytes_;
  int64_t own_;
  unsigned char* grad_negatives_;
};

template <class T, bool kSoft, bool kGraded>
class Block {
  static constexpr int kSize = Vector<T>::kSize, kWarps = kGradientThreads / 32;
  // Four of fp32 spill, and of any dtype where ranks are soft and graded.
  static constexpr bool kIsNarrow = sizeof(T) == 2 && !kIsTight && !(kSoft && kGraded);
  static constexpr int kAhead = kIsNarrow ? kTogether : 2;

 public:
  __device__ Block(const ClusterArgs& args, unsigned char* memory)
      : all_(args),
        args_(args.reward),
        has_marks_(args.reward.mask.data != nullptr || args.reward.index.data != nullptr),
        candidates_(static_cast<int>(args.reward.negatives) + 1),
        block_(cluster_rank()),
        blocks_(args.blocks),
        columns_(static_cast<int>(args.columns)),
        arrivals_(reinterpret_cast<Arrivals*>(memory)),
        tile_(reinterpret_cast<T*>(memory + Layout<T>::kArrivals)),
        gradient_(memory + Layout<T>::kArrivals + layout().tile()),
        exchange_(reinterpret_cast<float2*>(gradient_ + layout().gradient())),
        a_(reinterpret_cast<double*>(reinterpret_cast<unsigned char*>(exchange_) +
                                     layout().exchange())),
        b_(a_ + candidates_),
        place_(reinterpret_cast<int64_t*>(a_)),
        exponent_(reinterpret_cast<int*>(b_ + candidates_)),
        group_(reinterpret_cast<unsigned char*>(exponent_) + layout().exponents(), candidates_) {
    const int64_t left = args_.dim - first();
    width_ = left < columns_ ? left > 0 ? static_cast<int>(left) : 0 : columns_;
  }

  __device__ void open() {
    if (threadIdx.x < 3) arrivals_[threadIdx.x].init();
    if (!kSoft) group_.open(candidates_);
    clear_exponents();
    __syncthreads();
    cluster_sync();
  }

  __device__ void run(int64_t index) {
    index_ = index;
    if (threadIdx.x == 0) group_.total[Group::kUpstream] = upstream_of(args_, index);
    find_rows();
    load();
    const bool sound = rank_sound<kSoft, kGraded>(group_, candidates_, score(), args_, index_);
    if (block_ == 0) write_scores(args_, index, group_);
    if (wanted().any() || saves()) {
      set_coefficients<kSoft, kGraded>(group_, candidates_, sound,
                                       group_.total[Group::kQueryInverse], args_.weights, a_, b_);
      __syncthreads();
      if (block_ == 0 && saves()) write_coefficients();
    }
    if (wanted().negatives && !has_marks()) {
      gradients<true, false>(sound);
    } else if (wanted().negatives) {
      gradients<true, true>(sound);
    } else if (wanted().any()) {
      gradients<false, true>(sound);
    } else {
      total(sound);
      __syncthreads();  // what the next group writes is read no more
    }
  }

  // Before the block ends: its memory must outlive what other blocks send to it.
  __device__ void close() { cluster_sync(); }

 private:
  __device__ Layout<T> layout() const { return {candidates_, columns_, blocks_}; }
  __device__ Wanted wanted() const { return Wanted(args_); }
  // The first of this block's columns.
  __device__ int64_t first() const { return static_cast<int64_t>(columns_) * block_; }
  __device__ static int warp() { return static_cast<int>(threadIdx.x / 32); }
  __device__ bool has_marks() const { return has_marks_; }
  // As Candidates::place.
  __device__ int64_t place(int c) const { return has_marks() ? place_[c] : c > 0 ? c - 1 : 0; }
  // Whether candidate c's row is one that is read; the query's (-1) is.
  __device__ bool is_read(int c) const { return !has_marks() || c < 0 || place_[c] >= 0; }
  // Candidate c's columns in shared memory; -1: the query's.
  __device__ T* row(int c) const { return tile_ + (c + 1) * columns_; }
  __device__ Row<T> scaled_row(int c) const { return {row(c), 1, scale_of(c)}; }
  __device__ uint32_t row_bytes() const { return static_cast<uint32_t>(width_) * sizeof(T); }
  // The half-warp of this thread, which sums rows.
  __device__ static int half_warp() { return static_cast<int>(threadIdx.x) / kRowLanes; }
  static constexpr int kHalfWarps = kGradientThreads / kRowLanes;

  __device__ void find_rows() {
    if (!has_marks()) return;
    const Candidates<T> candidates(args_, index_);
    for (int c = static_cast<int>(threadIdx.x); c < candidates_; c += kGradientThreads) {
      place_[c] = candidates.place(c);
    }
    __syncthreads();
  }

  // Rows by their warp's first lane; all wait.
  __device__ void load() {
    const uint32_t bytes = row_bytes();
    if (threadIdx.x < 32) {
      read_ = static_cast<uint32_t>(candidates_) + 1;
      if (has_marks()) {
        int read = threadIdx.x == 0 ? 1 : 0;  // the query
        for (int c = static_cast<int>(threadIdx.x); c < candidates_; c += 32) read += is_read(c);
        read_ = static_cast<uint32_t>(warp_sum(read));
      }
      if (threadIdx.x == 0) arrivals_->expect(all_.is_boxed ? boxed_bytes() : bytes * read_);
    }
    if (threadIdx.x % 32 == 0 && bytes > 0) {
      const Candidates<T> candidates(args_, index_);
      if (threadIdx.x == 0) {
        if (all_.is_boxed) {
          const int word = static_cast<int>(first() * static_cast<int64_t>(sizeof(T)) / 4);
          box_load(row(1), &all_.negatives, word, static_cast<int>(index_), arrivals_);
        }
        const T* query = group_data<T>(args_.batch, args_.query, index_);
        bulk_load(row(-1), query + first(), bytes, arrivals_);
        bulk_load(row(0), candidates.positive + first(), bytes, arrivals_);
      }
      if (has_marks()) {
        for (int c = warp() + 1; c < candidates_; c += kWarps) {
          if (!is_read(c)) continue;
          bulk_load(row(c), candidates.at(c, place(c)).data + first(), bytes, arrivals_);
        }
      } else if (!all_.is_boxed) {
        load_negatives(candidates.negatives + first() + warp() * candidates.row_stride, bytes);
      }
    }
    __syncwarp();
    arrivals_->wait(phase_);
    phase_ ^= 1;
  }
  // Of the query, the positive, and a box of as many columns as any block's.
  __device__ uint32_t boxed_bytes() const {
    if (width_ == 0) return 0;
    const uint32_t box = static_cast<uint32_t>((candidates_ - 1) * columns_) * sizeof(T);
    return 2 * row_bytes() + box;
  }
  // Every kWarps-th from the warp's first. In steps: a product an address takes longer than a row.
  __device__ void load_negatives(const T* from, uint32_t bytes) {
    const int64_t step = kWarps * args_.negative.row_stride;
    T* to = row(warp() + 1);
#pragma unroll 1
    for (int c = warp() + 1; c < candidates_; c += kWarps) {
      bulk_load(to, from, bytes, arrivals_);
      from += step;
      to += kWarps * columns_;
    }
  }

  // Dots and squares of this block's columns, of rows as they are.
  __device__ void partial_sums() {
    if (width_ != kWholeSteps * kRowLanes * kSize) {
      partial_sums<0>([&](int, int at, float* q) { widen_all(load16(row(-1) + at), q); });
      return;
    }
    Words kept[kWholeSteps];
#pragma unroll
    for (int step = 0; step < kWholeSteps; ++step) {
      kept[step] = words_at(row(-1) + (step * kRowLanes + row_lane()) * kSize);
    }
    partial_sums<kWholeSteps>(
        [&](int step, int, float* q) { widen_all(elements<T>(kept[step]), q); });
  }
  template <int kSteps, class Query>
  __device__ void partial_sums(const Query& query) {
    const bool second = (threadIdx.x & kOfSecond) != 0;
#pragma unroll 1
    for (int first = -1; first + 2 * warp() < candidates_; first += 2 * kHalfWarps) {
      // The query's row in place of one that does not count: every lane takes part in the sums.
      const int one = first + half_warp(), two = one + kHalfWarps;
      bool is_one = one < candidates_, is_two = two < candidates_;
      if (has_marks()) is_one = is_one && is_read(one), is_two = is_two && is_read(two);
      const float2 sums =
          pair_sums<T, kSteps>(row(is_one ? one : -1), row(is_two ? two : -1), width_, query);
      if (second ? is_two : is_one) send(second ? two : one, threadIdx.x % 8, sums);
    }
  }

  // The same of rows at their exponents.
  __device__ void scaled_sums() {
    for (int first = -1; first < candidates_; first += kHalfWarps) {
      const int c = first + half_warp(), there = c < candidates_ && is_read(c) ? c : -1;
      const float2 sums = segment_sums(scaled_row(there), scaled_row(-1), 0, width_, true);
      if (there == c) send(c, row_lane(), sums);
    }
  }

  // A row's largest magnitude in this block's columns.
  __device__ void partial_magnitudes() {
    for (int first = -1; first < candidates_; first += kHalfWarps) {
      const int c = first + half_warp();
      const bool there = c < candidates_ && is_read(c);
      float largest = 0;
      for (int at = row_lane(); there && at < width_; at += kRowLanes) {
        largest = fmaxf(largest, magnitude_of(widen(row(c)[at])));
      }
      largest = row_max(largest);
      if (there) send(c, row_lane(), float2{largest, 0});
    }
  }

  // To block `to`, if there is one. By halves in turn: a block that is ahead by one exchange sends
  // into the other half than the one that is still read, and none is ahead by two.
  __device__ void send(int c, unsigned to, float2 x) {
    if (to >= static_cast<unsigned>(blocks_)) return;
    float2* half = exchange_ + turn_ * blocks_ * (candidates_ + 1);
    float2* const own = half + static_cast<int>(block_) * (candidates_ + 1) + c + 1;
    if (blocks_ == 1) {
      own->x = x.x, own->y = x.y;
    } else {
      cluster_send(own, to, x, arrivals_ + 1 + turn_);
    }
  }
  // Until every block has sent every row that is read.
  __device__ void exchanged() {
    Arrivals* const half = arrivals_ + 1 + turn_;
    if (blocks_ == 1) {
      __syncthreads();
    } else {
      if (threadIdx.x == 0) {
        half->expect(read_ * static_cast<uint32_t>(blocks_) * sizeof(float2));
      }
      half->wait(exchange_phase_ >> turn_ & 1);
      exchange_phase_ ^= 1u << turn_;
    }
    turn_ ^= 1;
  }
  // What block `from` sent of row c.
  __device__ float2 received(int from, int c) const {
    const int half = (turn_ ^ 1) * blocks_ * (candidates_ + 1);
    return exchange_[half + from * (candidates_ + 1) + c + 1];
  }

  __device__ double2 total(int c) const {
    double2 sum{0, 0};
#pragma unroll 4
    for (int from = 0; from < blocks_; ++from) {
      const float2 part = received(from, c);
      sum.x += part.x;
      sum.y += part.y;
    }
    return sum;
  }

  // Eq. (1) for every candidate, the same in every block; whether all are finite.
  __device__ bool score() {
    partial_sums();
    exchanged();
    if (__syncthreads_or(set_scores()) == 0) return true;
    rescale();
    set_scores();
    bool bad = false;
    for (int c = static_cast<int>(threadIdx.x); c < candidates_; c += kGradientThreads) {
      bad = bad || (place(c) != kMasked && isnan(group_.score[c]));
    }
    const bool sound = __syncthreads_or(bad) == 0;
    clear_exponents();
    return sound;
  }
  // For groups whose rows are all in range.
  __device__ void clear_exponents() {
    for (int c = static_cast<int>(threadIdx.x); c <= candidates_; c += kGradientThreads)
      exponent_[c] = 0;
  }

  // From the sums; whether some are of rows that are out of range as they are, or are not read.
  __device__ bool set_scores() {
    const double square = square_of(-1, total(-1)), query = inverse_of(square);
    bool far = !is_in_range(square);
    for (int c = static_cast<int>(threadIdx.x); c < candidates_; c += kGradientThreads) {
      const bool read = is_read(c), live = place(c) != kMasked;
      const double2 sums = read ? total(c) : double2{0, 0};
      const double own = read ? inverse_of(square_of(c, sums)) : live ? nan("") : 0;
      const int scale = scale_of(c);
      group_.set(c, live, sums.x, query, own, scale == 0 ? own : scalbn(own, -scale));
      far = far || (live && !(read && is_in_range(sums.y)));
    }
    if (threadIdx.x == 0) {
      group_.total[Group::kQueryInverse] = scalbn(query, -scale_of(-1));
      group_.set_rest(candidates_);
    }
    return far;
  }

  // Rows out of range get their exponents; then all sums again.
  __device__ void rescale() {
    for (int c = static_cast<int>(threadIdx.x) - 1; c < candidates_; c += kGradientThreads) {
      if (is_read(c) && !is_in_range(total(c).y)) exponent_[c + 1] = kZero;
    }
    partial_magnitudes();
    exchanged();
    for (int c = static_cast<int>(threadIdx.x) - 1; c < candidates_; c += kGradientThreads) {
      if (exponent_[c + 1] != kZero) continue;
      float largest = 0;
      for (int from = 0; from < blocks_; ++from) {
        largest = fmaxf(largest, received(from, c).x);
      }
      exponent_[c + 1] = exponent_of(largest);
    }
    __syncthreads();
    scaled_sums();
    exchanged();
  }

  __device__ int scale_of(int c) const { return elva::scale_of(exponent_[c + 1]); }
  // In units of 4^exponent.
  __device__ double square_of(int c, double2 sums) const {
    if (exponent_[c + 1] == kNotFinite) return nan("");
    if (exponent_[c + 1] == kZero) return 0;
    return sums.y;
  }

  // By the last warp, which has the fewest columns.
  __device__ void total(bool sound) {
    if (warp() != kWarps - 1) return;
    total_group<kGraded>(group_, candidates_, sound, group_.total[Group::kQueryInverse],
                         args_.weights);
    if (block_ != 0 || threadIdx.x % 32 != 0) return;
    write_rewards(args_, index_, group_);
    if (saves()) {
      coefficients_of_group()[2 * candidates_] = group_.total[Group::kQuery];
    }
  }

  // Whether a backward is to come, or the bank's gradient.
  __device__ bool saves() const {
    return args_.coefficients != nullptr && (args_.index.data != nullptr || !wanted().any());
  }
  __device__ double* coefficients_of_group() const {
    return args_.coefficients + index_ * (2 * candidates_ + 1);
  }
  // As reward_forward lays them out.
  __device__ void write_coefficients() {
    double* const out = coefficients_of_group();
    for (int i = static_cast<int>(threadIdx.x); i < 2 * candidates_; i += kGradientThreads)
      out[i] = a_[i];
  }

  template <bool kNegatives, bool kMarks>
  __device__ void gradients(bool sound) {
    using Rows = HeldRows<T, kMarks>;
    for (int at = 0; at < width_; at += all_.wide * kSize) {
      const int own = at + static_cast<int>(threadIdx.x) % all_.wide * kSize;
      const Rows rows(args_, index_, tile_ + own, columns_, first() + own);
      GradientColumns<T, kNegatives ? kAhead : 2, kNegatives, Rows>(
          all_.wide, (width_ - at) / kSize, a_, b_, group_.total[Group::kUpstream], gradient_, rows)
          .run(wanted().count(args_.negatives), group_.total + Group::kQuery, [&] {
            if (at == 0) total(sound);
          });
    }
    if (width_ == 0) __syncthreads();  // as after gradients
  }

  const ClusterArgs& all_;
  const ElvaRewardArgs& args_;
  bool has_marks_;  // of candidates that are not read
  int candidates_;
  uint32_t block_;
  int blocks_, columns_;
  int width_;
  Arrivals* arrivals_;
  T* tile_;
  unsigned char* gradient_;  // what GradientColumns takes
  float2* exchange_;
  double *a_, *b_;
  int64_t* place_;  // where the candidates lie; in the memory of a_, until there are coefficients
  int* exponent_;   // of the query, then of the candidates
  Group group_;
  int64_t index_ = 0;
  uint32_t read_ = 0;  // rows, the query among them; of the first warp
  uint32_t phase_ = 0, exchange_phase_ = 0;
  int turn_ = 0;
};

}  // namespace elva
#endif  // ELVA_CUDA_REWARD_BLOCK_H_
