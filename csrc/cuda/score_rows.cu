// What: statistics of rows of products of embeddings: the positives' scores and ranks among the
//   negatives, the hardest negative, sums of exponentials.
// Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; cosine (8), negatives (9), rank (10),
//   log-sum-exp (11) of elva_kernels.reference.
// In: products [R, width] in fp32 of rows as unit_rows keeps them, their inverse norms; targets,
//   other candidates that are no negatives.
// Out: counts int32, scores fp32, sums double; NaN in the place of products of no negatives, or
//   masked scores in the place of all.
// Work split: a block a row.
// Bytes: a row once, and once more from cache for every 4 positives after the first; written once
//   where scores are kept.
// Numerics: exponentials and sums of 8 in fp32, those sums in double, in an order of their own. Ties
//   by lower index. No atomics: deterministic.
// Limits: rows of fewer than 2^31 products.
// Reference: elva_kernels.reference.statistics_of_scores.
#include "../elva_in_batch_cuda.h"
#include "scores.h"

namespace elva {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kVectors = 2;  // of four products, a thread's at a time
constexpr int kAtOnce = kVectors * kFour;
constexpr int kTogether = 4;  // positives from the second that are counted in a pass

// Of a block: every warp's value into `shared` [kWarps], then each thread adds them in order.
template <class V>
__device__ inline V block_sum(V x, V* shared) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  V sum = shared[0];
  for (int w = 1; w < kWarps; ++w) sum += shared[w];
  return sum;
}

// How a row's negatives stand to a score.
struct Counts {
  int greater = 0, equal = 0;

  __device__ void add(float negative, float score) {
    greater += negative > score;
    equal += negative == score;
  }
};

// The hardest negative so far, -1 for none: the highest score, then the lowest index.
struct Hardest {
  float score = -INFINITY;
  int place = -1;

  __device__ void take(float other, int other_place) {
    if (other > score || (other == score && other_place < place)) {
      score = other, place = other_place;
    }
  }
};

struct Shared {
  double sums[kWarps];
  float bests[kWarps];
  int places[kWarps], counts[kWarps];
  Counts further[kWarps * kTogether];
};

// What negatives are held against for a positive's score: counts are finite negatives for a pair
// that is not finite, nothing where there is no positive.
__device__ inline float bar_of(float score) {
  return isnan(score) ? -INFINITY : score == -INFINITY ? INFINITY : score;
}

// A query's row of products.
class Products {
 public:
  __device__ explicit Products(const ElvaCudaScoreArgs& args)
      : args_(args),
        row_(args.products + blockIdx.x * args.width),
        query_(args.query_inverse[blockIdx.x]),
        limit_(limit_of(args.max_score)) {}

  __device__ bool is_candidate(int64_t j) const { return j >= 0 && j < args_.candidates; }
  __device__ void mask(int64_t j) const { row_[j] = nanf(""); }
  // Before any is masked.
  __device__ float positive_score(int64_t j) const {
    if (j == -1) return -INFINITY;
    if (!is_candidate(j)) return nanf("");
    const float cosine = cosine_of(row_[j], query_, args_.candidate_inverse[j]);
    return isnan(cosine) ? cosine : clamped(cosine);
  }
  // After `read` has walked over all of them.
  __device__ float score(int64_t j) const {
    if (args_.keeps_scores) return row_[j];
    return masked_score(cosine_of(row_[j], query_, args_.candidate_inverse[j]), limit_);
  }
  // The thread's masked products of rows that are not finite.
  __device__ int unsound() const {
    int count = 0;
    for (int64_t j = threadIdx.x; j < args_.candidates; j += kThreads) {
      const bool bad = isnan(query_) || isnan(args_.candidate_inverse[j]);
      count += bad && !isnan(row_[j]);
    }
    return count;
  }
  // The masked scores of the thread's products from `first` on, kept where they are to be; -inf
  // beyond.
  __device__ void read(int64_t first, float* scores) const {
    Vector<float> products[kVectors], inverses[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t j = place(first, v);
      if (j < args_.width) {
        products[v] = load16(row_ + j);
        inverses[v] = load16(args_.candidate_inverse + j);
      } else {
#pragma unroll
        for (int e = 0; e < kFour; ++e) products[v].at[e] = inverses[v].at[e] = nanf("");
      }
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      Vector<float> kept;
#pragma unroll
      for (int e = 0; e < kFour; ++e) {
        const float cosine = cosine_of(products[v].at[e], query_, inverses[v].at[e]);
        kept.at[e] = scores[kFour * v + e] = masked_score(cosine, limit_);
      }
      const int64_t j = place(first, v);
      if (args_.keeps_scores && j < args_.width) store16(row_ + j, kept);
    }
  }
  // The first of those that `read` gave from `first` on whose score it is.
  __device__ int place_of(float score, int64_t first) const {
#pragma unroll 1
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t j = place(first, i / kFour) + i % kFour;
      if (j < args_.width && this->score(j) == score) return static_cast<int>(j);
    }
    return -1;
  }

 private:
  __device__ static int64_t place(int64_t first, int vector) {
    return first + (vector * kThreads + static_cast<int64_t>(threadIdx.x)) * kFour;
  }

  const ElvaCudaScoreArgs& args_;
  float* row_;
  float query_, limit_;
};

// A query's positives, and its other candidates that are no negatives.
class Positives {
 public:
  __device__ Positives(const ElvaCudaScoreArgs& args, const Products& products)
      : args_(args),
        products_(products),
        target_(args.target + blockIdx.x * args.positives),
        score_(args.target_score + blockIdx.x * args.positives) {}

  __device__ float first_score() const {
    return args_.positives > 0 ? products_.positive_score(target_[0]) : -INFINITY;
  }
  // Whether one of the thread's is not finite.
  __device__ bool write_scores() const {
    bool bad = false;
    for (int64_t p = threadIdx.x; p < args_.positives; p += kThreads) {
      score_[p] = products_.positive_score(target_[p]);
      bad = bad || isnan(score_[p]);
    }
    return bad;
  }
  // All that are no negatives, what pads the row too. No product is NaN before it.
  __device__ void mask() const {
    for (int64_t p = threadIdx.x; p < args_.positives; p += kThreads) mask(target_[p]);
    for (int64_t j = args_.candidates + threadIdx.x; j < args_.width; j += kThreads) {
      products_.mask(j);
    }
    if (args_.skipped == nullptr) return;
    for (int64_t s = 0; s < args_.segments; ++s) {
      const int64_t at = blockIdx.x * args_.segments + s, last = args_.skipped_last[at];
      for (int64_t x = args_.skipped_first[at] + threadIdx.x; x < last; x += kThreads) {
        mask(args_.skipped[x]);
      }
    }
  }
  // Where the negatives that are not finite are `unsound`.
  __device__ void write_counts(int64_t p, const Counts& counts, int unsound) const {
    const bool there = target_[p] != -1;
    const int64_t at = blockIdx.x * args_.positives + p;
    const int greater = there ? counts.greater : 0, equal = !there             ? 0
                                                            : isnan(score_[p]) ? unsound
                                                                               : counts.equal;
    args_.n_greater[at] = greater;
    args_.n_equal[at] = equal;
    args_.rank[at] = greater + equal + there;
  }
  // After write_scores, on all threads.
  __device__ float bar(int64_t p) const { return bar_of(score_[p]); }

 private:
  __device__ void mask(int64_t j) const {
    if (products_.is_candidate(j)) products_.mask(j);
  }

  const ElvaCudaScoreArgs& args_;
  const Products& products_;
  const int64_t* target_;
  float* score_;
};

// Of a row that was walked over: the counts of the positives from the second, kTogether in a pass.
// A pass is left out where none of its scores is within the negatives'.
__device__ inline void count_further(const ElvaCudaScoreArgs& args, const Products& products,
                                     const Positives& positives, float hardest, int unsound,
                                     Counts* shared) {
  for (int64_t first = 1; first < args.positives; first += kTogether) {
    float bars[kTogether];
    bool within = false;
#pragma unroll
    for (int q = 0; q < kTogether; ++q) {
      bars[q] = first + q < args.positives ? positives.bar(first + q) : INFINITY;
      within = within || (bars[q] <= hardest && hardest > -INFINITY);
    }
    Counts counts[kTogether];
    if (within) {
#pragma unroll 4
      for (int64_t j = threadIdx.x; j < args.candidates; j += kThreads) {
        const float score = products.score(j);
#pragma unroll
        for (int q = 0; q < kTogether; ++q) counts[q].add(score, bars[q]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int q = 0; q < kTogether; ++q) {
      const int greater = warp_sum(counts[q].greater), equal = warp_sum(counts[q].equal);
      if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32 * kTogether + q] = {greater, equal};
    }
    __syncthreads();
    const int64_t p = first + threadIdx.x;
    if (threadIdx.x < kTogether && p < args.positives) {
      Counts all;
      for (int w = 0; w < kWarps; ++w) {
        all.greater += shared[w * kTogether + threadIdx.x].greater;
        all.equal += shared[w * kTogether + threadIdx.x].equal;
      }
      positives.write_counts(p, all, unsound);
    }
  }
}

// Of all threads' on every thread.
__device__ inline Hardest block_hardest(Hardest hardest, Shared* shared) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, hardest.score, offset);
    const int other_place = __shfl_xor_sync(kAllLanes, hardest.place, offset);
    if (other_place >= 0) hardest.take(other, other_place);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    shared->bests[threadIdx.x / 32] = hardest.score;
    shared->places[threadIdx.x / 32] = hardest.place;
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    if (shared->places[w] >= 0) hardest.take(shared->bests[w], shared->places[w]);
  }
  return hardest;
}

__global__ void __launch_bounds__(kThreads, 4)
    score_rows(const __grid_constant__ ElvaCudaScoreArgs args) {
  ELVA_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Products products(args);
  const Positives positives(args, products);
  const float first_bar = bar_of(positives.first_score());
  const bool some_bad = __syncthreads_or(positives.write_scores()) != 0;
  positives.mask();
  __syncthreads();
  const bool summed = args.temperature != nullptr;
  const float scale = summed ? scale_of_gaps(args.temperature) : 0;
  float greater = 0, equal = 0;  // two instructions each; exact up to 2^24 scores of a thread
  ScoreSums sums;
  int unsound = 0;
  if (some_bad) {  // before scores take their place
    unsound = block_sum(products.unsound(), shared.counts);
  }
  float best = -INFINITY;
  int64_t from = -1;  // where the thread has read its best
#pragma unroll 1
  for (int64_t first = 0; first < args.width; first += kAtOnce * kThreads) {
    float scores[kAtOnce], highest = -INFINITY;
    products.read(first, scores);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      greater += scores[i] > first_bar ? 1.0f : 0.0f;
      equal += scores[i] == first_bar ? 1.0f : 0.0f;
      highest = fmaxf(highest, scores[i]);
    }
    if (highest > best) best = highest, from = first;
    if (summed) sums.add<kAtOnce>(scores, highest, scale);
  }
  Hardest hardest;
  if (from >= 0) hardest = {best, products.place_of(best, from)};
  hardest = block_hardest(hardest, &shared);
  Counts counts;
  counts.greater = block_sum(static_cast<int>(greater), shared.counts);
  counts.equal = block_sum(static_cast<int>(equal), shared.counts);
  if (threadIdx.x == 0) {
    if (args.positives > 0) positives.write_counts(0, counts, unsound);
    args.hardest_score[blockIdx.x] = hardest.score;
    args.hardest_index[blockIdx.x] = hardest.place;
  }
  count_further(args, products, positives, hardest.score, unsound, shared.further);
  if (!summed) return;
  sums.raise(hardest.score, scale);
  const double sum = block_sum(sums.sum, shared.sums);
  const double moment = block_sum(sums.moment, shared.sums);
  if (threadIdx.x == 0) {
    args.sum[blockIdx.x] = sum;
    args.moment[blockIdx.x] = moment;
  }
}

}  // namespace
}  // namespace elva

extern "C" ElvaStatus elva_score_rows_cuda(const ElvaCudaScoreArgs* args) {
  using namespace elva;
  return on_device(ELVA_FP32, args->device, [args](auto) {
    return launch(score_rows, args->rows, 0, kThreads, sizeof(Shared), args->stream, *args);
  });
}
