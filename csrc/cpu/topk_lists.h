// The best rows seen so far by each thread, for each query, and their merge.
#ifndef ELVA_CPU_TOPK_LISTS_H_
#define ELVA_CPU_TOPK_LISTS_H_

#include <math.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "arena.h"
#include "row_layout.h"

namespace elva {

template <class V>
struct Hit {
  V score;  // never NaN
  int64_t index;
};

// The total order of results: no two hits of a query are equal in it, so that what is kept depends
// neither on the threads nor on the order in which rows are seen.
template <class V>
bool better(const Hit<V>& a, const Hit<V>& b) {
  return a.score > b.score || (a.score == b.score && a.index < b.index);
}

// A heap of at most k hits for each query of each slot; a thread holds one slot while it scans.
template <class V>
class Lists {
 public:
  static size_t bytes(int64_t slots, int64_t queries, int64_t k) {
    return Arena::bytes_for<Hit<V>>(slots * queries * k) +
           Arena::bytes_for<int64_t>(slots * queries) + Arena::bytes_for<std::atomic<bool>>(slots);
  }

  // Throws std::bad_alloc.
  Lists(int64_t slots, int64_t queries, int64_t k) : slots_(slots), queries_(queries), k_(k) {
    memory_.reset(bytes(slots, queries, k));
    hits_ = memory_.take<Hit<V>>(slots * queries * k);
    sizes_ = memory_.take<int64_t>(slots * queries);
    std::fill(sizes_, sizes_ + slots * queries, 0);
    taken_ = memory_.take<std::atomic<bool>>(slots);
    for (int64_t i = 0; i < slots; ++i) new (taken_ + i) std::atomic<bool>(false);
  }

  // A slot that nobody else holds; there are as many as threads.
  int64_t acquire() {
    for (int64_t slot = 0;; slot = (slot + 1) % slots_) {
      if (!taken_[slot].exchange(true, std::memory_order_acquire)) return slot;
    }
  }
  void release(int64_t slot) { taken_[slot].store(false, std::memory_order_release); }

  // Keeps `hit` where it is among the k best of (slot, query).
  void offer(int64_t slot, int64_t query, const Hit<V>& hit) {
    Hit<V>* heap = hits_ + (slot * queries_ + query) * k_;
    int64_t& size = sizes_[slot * queries_ + query];
    if (size < k_) {
      heap[size++] = hit;
      std::push_heap(heap, heap + size, better<V>);
    } else if (better(hit, heap[0])) {
      std::pop_heap(heap, heap + k_, better<V>);
      heap[k_ - 1] = hit;
      std::push_heap(heap, heap + k_, better<V>);
    }
  }

  // The score that a hit must reach to be kept: the worst kept one's, -inf while there is room.
  V threshold(int64_t slot, int64_t query) const {
    if (sizes_[slot * queries_ + query] < k_) return -std::numeric_limits<V>::infinity();
    return hits_[(slot * queries_ + query) * k_].score;
  }

  // The k best hits of all slots, in order, and how many there are in all. out has room for
  // slots * k.
  int64_t merge(int64_t query, Hit<V>* out) const {
    Hit<V>* end = out;
    for (int64_t slot = 0; slot < slots_; ++slot) {
      const Hit<V>* heap = hits_ + (slot * queries_ + query) * k_;
      end = std::copy(heap, heap + sizes_[slot * queries_ + query], end);
    }
    std::partial_sort(out, out + std::min<int64_t>(k_, end - out), end, better<V>);
    return end - out;
  }

 private:
  const int64_t slots_, queries_, k_;
  Arena memory_;
  Hit<V>* hits_;
  int64_t* sizes_;
  std::atomic<bool>* taken_;
};

}  // namespace elva
#endif  // ELVA_CPU_TOPK_LISTS_H_
