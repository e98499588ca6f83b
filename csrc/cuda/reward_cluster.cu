// What: the grouped ranking reward with its gradients, each group read once and held in the shared
//   memory of a cluster of blocks (sm_90 and later).
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; cosine (1), rank (2), margin reward (3),
//   rank reward (4), reward (5), soft rank (6) of elva_kernels.reference.
// In: as reward.cu, rows dense and on 16 bytes.
// Out: as reward.cu.
// Work split: a cluster a group, over and over; a block some columns of all of the group's rows, so
//   that every gradient is its own; a warp two rows, then reward_gradient.h. Blocks send each other a
//   product and a square a row through distributed shared memory, and each block ranks for itself.
// Bytes: each input read once by bulk copies, one a row, wherever it lies; each gradient that is
//   wanted written once, from the place where the row lay: 2 (N + 2) D elements a group, the floor.
// Numerics: as reward.cu, to the last bit. No atomics: the same bits on every run.
// Limits: a group of (N + 2) D elements in 8 times 227 KB.
// Reference: elva_kernels.reference.ranking_reward_and_grad.
#include "cluster.h"
#include "reward_cluster.h"

namespace elva {
namespace {

constexpr int kThreads = kGradientThreads;
constexpr int kMostBlocks = 8;
constexpr size_t kMostShared = 227 << 10;
constexpr size_t kHalfShared = 113 << 10;  // two blocks a multiprocessor: one loads, one stores
constexpr int64_t kLongSegment = 2048;     // where no block decides

int64_t rounded_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

struct ClusterArgs {
  ElvaRewardArgs reward;
  int64_t columns;
  int64_t clusters;
};

// A block's shared memory, in order.
template <class T>
struct Layout {
  int64_t candidates, columns, blocks;

  static constexpr size_t kArrivals = 32;  // of the rows, and of either half of the exchange
  // The rows: the query's, then the candidates'.
  __host__ __device__ size_t tile() const {
    return static_cast<size_t>((candidates + 1) * columns) * sizeof(T);
  }
  // A product and a square of the query and the candidates, from every block, twice.
  __host__ __device__ size_t exchange() const {
    return 2 * static_cast<size_t>(blocks * (candidates + 1)) * sizeof(float2);
  }
  __host__ __device__ size_t coefficients() const {
    return 2 * static_cast<size_t>(candidates) * sizeof(double);
  }
  __host__ __device__ size_t exponents() const {
    return static_cast<size_t>((candidates + 2) / 2 * 2) * sizeof(int);
  }
  size_t bytes() const {
    return kArrivals + tile() + kGradientShared + exchange() + coefficients() + exponents() +
           Group::bytes(candidates);
  }
};

template <class T>
class Block {
  static constexpr int kSize = Vector<T>::kSize, kWarps = kThreads / 32;
  static constexpr int kAhead = sizeof(T) == 2 ? 4 : 3;  // four of fp32 spill on sm_120
  static constexpr int kKept = 512;                      // columns of the query that registers hold

 public:
  __device__ Block(const ClusterArgs& args, unsigned char* memory, int blocks)
      : args_(args.reward),
        candidates_(static_cast<int>(args.reward.negatives) + 1),
        block_(cluster_rank()),
        blocks_(blocks),
        columns_(static_cast<int>(args.columns)),
        layout_{candidates_, columns_, blocks},
        arrivals_(reinterpret_cast<Arrivals*>(memory)),
        tile_(reinterpret_cast<T*>(memory + Layout<T>::kArrivals)),
        gradient_(memory + Layout<T>::kArrivals + layout_.tile()),
        exchange_(reinterpret_cast<float2*>(gradient_ + kGradientShared)),
        a_(reinterpret_cast<double*>(reinterpret_cast<unsigned char*>(exchange_) +
                                     layout_.exchange())),
        b_(a_ + candidates_),
        place_(reinterpret_cast<int64_t*>(a_)),
        exponent_(reinterpret_cast<int*>(b_ + candidates_)),
        group_(reinterpret_cast<unsigned char*>(exponent_) + layout_.exponents(), candidates_) {
    first_ = static_cast<int64_t>(columns_) * block_;
    const int64_t left = args_.dim > first_ ? args_.dim - first_ : 0;
    width_ = left < columns_ ? static_cast<int>(left) : columns_;
  }

  __device__ void open() {
    if (threadIdx.x < 3) arrivals_[threadIdx.x].init();
    __syncthreads();
    cluster_sync();
  }

  __device__ void run(int64_t index) {
    index_ = index;
    find_rows();
    load();
    score();
    __syncthreads();
    rank_group(group_, candidates_, args_.weights);
    __syncthreads();
    if (threadIdx.x < 32) total_group(group_, candidates_, args_.weights);
    __syncthreads();
    if (block_ == 0) write_group(args_, index, group_);
    set_coefficients(group_, candidates_, query_norm_, args_.weights, a_, b_);
    __syncthreads();
    if (threadIdx.x < 32) total_query(group_, candidates_, query_norm_, b_);
    __syncthreads();
    if (block_ == 0 && args_.index.data != nullptr) write_coefficients();
    gradients();
    store();
  }

  // Before the block ends: its memory must outlive the stores from it, and those of other blocks
  // into it.
  __device__ void close() {
    if (threadIdx.x % 32 == 0) wait_bulk_stores();
    cluster_sync();
  }

 private:
  __device__ static int warp() { return static_cast<int>(threadIdx.x / 32); }
  __device__ bool has_marks() const {
    return args_.mask.data != nullptr || args_.index.data != nullptr;
  }
  // As Candidates::place.
  __device__ int64_t place(int c) const { return has_marks() ? place_[c] : c > 0 ? c - 1 : 0; }
  // Whether candidate c's row is one that is read; the query's (-1) is.
  __device__ bool is_read(int c) const { return c < 0 || place(c) >= 0; }
  // Candidate c's columns in shared memory; -1: the query's.
  __device__ T* row(int c) const { return tile_ + (c + 1) * columns_; }
  __device__ Row<T> scaled_row(int c) const { return {row(c), 1, scale_of(c)}; }

  __device__ void find_rows() {
    if (!has_marks()) return;
    const Candidates<T> candidates(args_, index_);
    for (int c = static_cast<int>(threadIdx.x); c < candidates_; c += kThreads) {
      place_[c] = candidates.place(c);
    }
    __syncthreads();
  }

  // A row by its warp's first lane, which stored the group before from there; all wait.
  __device__ void load() {
    const uint32_t bytes = static_cast<uint32_t>(width_) * static_cast<uint32_t>(sizeof(T));
    if (threadIdx.x < 32) {
      int read = threadIdx.x == 0 ? 1 : 0;  // the query
      for (int c = static_cast<int>(threadIdx.x); c < candidates_; c += 32) read += is_read(c);
      read_ = static_cast<uint32_t>(warp_sum(read));
      if (threadIdx.x == 0) arrivals_->expect(bytes * read_);
    }
    if (threadIdx.x % 32 == 0) {
      wait_bulk_stores();
      const T* query = group_data<T>(args_.batch, args_.query, index_);
      const Candidates<T> candidates(args_, index_);
      if (threadIdx.x == 0 && bytes > 0) bulk_load(row(-1), query + first_, bytes, arrivals_);
      for (int c = warp(); c < candidates_; c += kWarps) {
        if (bytes == 0 || !is_read(c)) continue;
        bulk_load(row(c), candidates.at(c, place(c)).data + first_, bytes, arrivals_);
      }
    }
    __syncwarp();
    arrivals_->wait(phase_);
    phase_ ^= 1;
  }

  // Dots and squares of this block's columns, of rows as they are.
  __device__ void partial_sums() {
    constexpr int kSteps = kKept / (32 * kSize);
    if (width_ > kKept) {
      partial_sums<0>([&](int, int at, float* q) { widen_all(load16(row(-1) + at), q); });
      return;
    }
    float kept[kSteps][kSize];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int at = (step * 32 + static_cast<int>(threadIdx.x % 32)) * kSize;
      if (at < width_) widen_all(load16(row(-1) + at), kept[step]);
    }
    partial_sums<kSteps>([&](int step, int, float* q) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) q[i] = kept[step][i];
    });
  }
  template <int kSteps, class Query>
  __device__ void partial_sums(const Query& query) {
    const uint32_t lane = threadIdx.x % 32, to = lane % 8;
    for (int c = warp() - 1; c < candidates_; c += 2 * kWarps) {
      const int next = c + kWarps < candidates_ ? c + kWarps : c;
      const bool read = is_read(c), next_read = next != c && is_read(next);
      if (!read && !next_read) continue;
      const float2 sums = pair_sums<T, kSteps>(row(c), row(next), width_, query);
      const bool second = (lane & kOfSecond) != 0;
      if (lane < 16 && (second ? next_read : read)) send(second ? next : c, to, sums);
    }
  }

  // The same of rows at their exponents.
  __device__ void scaled_sums() {
    for (int c = warp() - 1; c < candidates_; c += kWarps) {
      if (!is_read(c)) continue;
      send(c, threadIdx.x % 32, segment_sums(scaled_row(c), scaled_row(-1), 0, width_, true));
    }
  }

  // A row's largest magnitude in this block's columns.
  __device__ void partial_magnitudes() {
    for (int c = warp() - 1; c < candidates_; c += kWarps) {
      if (!is_read(c)) continue;
      float largest = 0;
      for (int at = static_cast<int>(threadIdx.x % 32); at < width_; at += 32) {
        largest = fmaxf(largest, magnitude_of(widen(row(c)[at])));
      }
      send(c, threadIdx.x % 32, float2{warp_max(largest), 0});
    }
  }

  // To block `to`, if there is one. By halves in turn: a block that is ahead by one exchange sends
  // into the other half than the one that is still read, and none is ahead by two.
  __device__ void send(int c, uint32_t to, float2 x) {
    if (to >= static_cast<uint32_t>(blocks_)) return;
    float2* half = exchange_ + turn_ * blocks_ * (candidates_ + 1);
    cluster_send(half + static_cast<int>(block_) * (candidates_ + 1) + c + 1, to, x,
                 arrivals_ + 1 + turn_);
  }
  // Until every block has sent every row that is read.
  __device__ void exchanged() {
    Arrivals* const half = arrivals_ + 1 + turn_;
    if (threadIdx.x == 0) {
      half->expect(read_ * static_cast<uint32_t>(blocks_) * static_cast<uint32_t>(sizeof(float2)));
    }
    half->wait(exchange_phase_ >> turn_ & 1);
    exchange_phase_ ^= 1u << turn_;
    turn_ ^= 1;
  }
  // What block `from` sent of row c.
  __device__ float2 received(int from, int c) const {
    const int half = (turn_ ^ 1) * blocks_ * (candidates_ + 1);
    return exchange_[half + from * (candidates_ + 1) + c + 1];
  }

  __device__ double2 total(int c) const {
    double2 sum{0, 0};
    for (int from = 0; from < blocks_; ++from) {
      const float2 part = received(from, c);
      sum.x += part.x;
      sum.y += part.y;
    }
    return sum;
  }

  // Eq. (1) for every candidate. The same in every block.
  __device__ void score() {
    for (int c = static_cast<int>(threadIdx.x); c <= candidates_; c += kThreads) exponent_[c] = 0;
    __syncthreads();
    partial_sums();
    exchanged();
    bool far = false;
    for (int c = static_cast<int>(threadIdx.x) - 1; c < candidates_; c += kThreads) {
      if (!is_read(c) || is_in_range(total(c).y)) continue;
      exponent_[c + 1] = kZero;  // until it is known
      far = true;
    }
    if (__syncthreads_or(far) != 0) rescale();
    const double query = norm_of(-1);
    query_norm_ = scalbn(query, scale_of(-1));
    for (int c = static_cast<int>(threadIdx.x); c < candidates_; c += kThreads) {
      const bool read = is_read(c), live = place(c) != kMasked;
      const double own = read ? norm_of(c) : live ? nan("") : 0;
      group_.set(c, live, read ? total(c).x : 0, query, own, scalbn(own, scale_of(c)));
    }
  }

  // Rows whose exponents are kZero get their own; then all sums again.
  __device__ void rescale() {
    partial_magnitudes();
    exchanged();
    for (int c = static_cast<int>(threadIdx.x) - 1; c < candidates_; c += kThreads) {
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
  // In units of 2^exponent.
  __device__ double norm_of(int c) const {
    if (exponent_[c + 1] == kNotFinite) return nan("");
    if (exponent_[c + 1] == kZero) return 0;
    return sqrt(total(c).y);
  }

  // For the bank's gradient: as reward_forward lays them out.
  __device__ void write_coefficients() {
    double* const out = args_.coefficients + index_ * (2 * candidates_ + 1);
    for (int i = static_cast<int>(threadIdx.x); i < 2 * candidates_; i += kThreads) out[i] = a_[i];
    if (threadIdx.x == 0) out[2 * candidates_] = group_.total[Group::kQuery];
  }

  // Gradient rows in place of the rows.
  __device__ void gradients() {
    const Wanted wanted(args_);
    const double upstream = upstream_of(args_, index_), query_b = group_.total[Group::kQuery];
    for (int first = 0; first < width_; first += kWide * kSize) {
      const int at = first + static_cast<int>(threadIdx.x % kWide) * kSize;
      const auto read = [&](int64_t c) { return load16(row(static_cast<int>(c)) + at); };
      const auto write = [&](int64_t c, const auto* gradient) {
        store16_shared(row(static_cast<int>(c)) + at, packed<T>(gradient));
      };
      const auto columns = [&](auto negatives) {
        constexpr bool kNegatives = decltype(negatives)::value;
        gradient_columns<T, kNegatives ? kAhead : 2, kNegatives>(  // more spill on sm_100
            wanted.count(candidates_), a_, b_, query_b, upstream, at < width_, gradient_, read,
            write);
      };
      if (wanted.negatives) {
        columns(std::true_type());
      } else {
        columns(std::false_type());
      }
    }
  }

  // A row by the lane that loads the next one there.
  __device__ void store() {
    before_bulk_store();
    __syncthreads();
    if (threadIdx.x % 32 != 0 || width_ == 0) return;
    const uint32_t bytes = static_cast<uint32_t>(width_) * static_cast<uint32_t>(sizeof(T));
    const int64_t dim = args_.dim, own = index_ * dim + first_;
    const Wanted wanted(args_);
    if (threadIdx.x == 0 && wanted.query) {
      bulk_store(static_cast<T*>(args_.grad_query) + own, row(-1), bytes);
    }
    if (threadIdx.x == 0 && wanted.positive) {
      bulk_store(static_cast<T*>(args_.grad_positive) + own, row(0), bytes);
    }
    if (!wanted.negatives) return;
    T* out = static_cast<T*>(args_.grad_negative) + index_ * args_.negatives * dim + first_;
    for (int c = warp(); c < candidates_; c += kWarps) {
      if (c > 0) bulk_store(out + (c - 1) * dim, row(c), bytes);
    }
  }

  const ElvaRewardArgs& args_;
  int candidates_;
  uint32_t block_;
  int blocks_, columns_;
  int64_t first_;
  int width_;
  Layout<T> layout_;
  Arrivals* arrivals_;
  T* tile_;
  unsigned char* gradient_;  // what gradient_columns takes
  float2* exchange_;
  double *a_, *b_;
  int64_t* place_;  // where the candidates lie; in the memory of a_, until there are coefficients
  int* exponent_;   // of the query, then of the candidates
  Group group_;
  int64_t index_ = 0;
  double query_norm_ = 0;
  uint32_t read_ = 0;  // rows, the query among them; of the first warp
  uint32_t phase_ = 0, exchange_phase_ = 0;
  int turn_ = 0;
};

template <class T, int kBlocks>
__global__ void __launch_bounds__(kThreads, 2)
    reward_value_and_grad(const __grid_constant__ ClusterArgs args) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  ELVA_DYNAMIC_SHARED(memory);
  Block<T> block(args, memory, kBlocks);
  block.open();
  for (int64_t index = blockIdx.x / kBlocks; index < args.reward.batch.groups;
       index += args.clusters) {
    block.run(index);
  }
  block.close();
#endif
}

template <class T, int kBlocks>
ElvaStatus launch_clusters(const ElvaRewardArgs& args, int64_t columns) {
  const size_t bytes = Layout<T>{args.negatives + 1, columns, kBlocks}.bytes();
  ClusterArgs all = {args, columns, 0};
  int clusters = 0;
  const ElvaStatus status =
      most_clusters(reward_value_and_grad<T, kBlocks>, kBlocks, kThreads, bytes, &clusters);
  if (status != ELVA_OK) return status;
  if (clusters == 0) return ELVA_UNSUPPORTED;
  all.clusters = clusters < args.batch.groups ? clusters : args.batch.groups;
  return launch(reward_value_and_grad<T, kBlocks>, all.clusters * kBlocks, kBlocks, kThreads, bytes,
                args.stream, all);
}

}  // namespace

template <class T>
Split split_of(int64_t candidates, int64_t dim) {
  for (int blocks : {1, 2, 4, kMostBlocks}) {
    const int64_t columns = rounded_up((dim + blocks - 1) / blocks, Vector<T>::kSize);
    const size_t most = blocks == kMostBlocks ? kMostShared : kHalfShared;
    if (Layout<T>{candidates, columns, blocks}.bytes() <= most) return {columns, blocks};
  }
  return {kLongSegment, 0};
}

template <class T>
ElvaStatus cluster_reward(const ElvaRewardArgs& args, const Split& split) {
  if (args.batch.groups == 0) return ELVA_OK;
  if (!has_clusters() || !has_whole_rows<T>(args)) return ELVA_UNSUPPORTED;
  switch (split.blocks) {
    case 1:
      return launch_clusters<T, 1>(args, split.columns);
    case 2:
      return launch_clusters<T, 2>(args, split.columns);
    case 4:
      return launch_clusters<T, 4>(args, split.columns);
    default:
      return launch_clusters<T, kMostBlocks>(args, split.columns);
  }
}

template Split split_of<Bf16>(int64_t, int64_t);
template Split split_of<Fp16>(int64_t, int64_t);
template Split split_of<float>(int64_t, int64_t);
template ElvaStatus cluster_reward<Bf16>(const ElvaRewardArgs&, const Split&);
template ElvaStatus cluster_reward<Fp16>(const ElvaRewardArgs&, const Split&);
template ElvaStatus cluster_reward<float>(const ElvaRewardArgs&, const Split&);

}  // namespace elva
