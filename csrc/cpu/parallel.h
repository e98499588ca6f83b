// Loops over several threads: those of the OpenMP runtime that torch has loaded, where there is
// one, else a small pool of our own that sleeps when it has nothing to do. Never a second OpenMP
// runtime: the two would spin against each other.
#ifndef ELVA_CPU_PARALLEL_H_
#define ELVA_CPU_PARALLEL_H_

#include <stdint.h>

#include <atomic>
#include <new>

#include "../elva.h"

namespace elva {

// Calls body(context, begin, end) on pieces of `grain` items or more that cover [0, items), on at
// most `threads` threads, the caller included; returns when all are done. Pieces may run in any
// order. Runs on the caller alone where that is all there is: one piece, threads <= 1, the pool in
// use by another thread, no thread to be had. Safe after fork (the child builds its own pool) and
// at process exit (the pool is never torn down). Threads run with default rounding and with
// subnormal numbers, whatever the caller set.
void parallel_for(int64_t items, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t),
                  void* context);

template <class Body>
void parallel_for(int64_t items, int64_t grain, int threads, const Body& body) {
  parallel_for(
      items, grain, threads,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<Body*>(&body));
}

// The status of body(), which may run out of memory. No exception leaves the C API.
template <class Body>
ElvaStatus within_memory(const Body& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return ELVA_OUT_OF_MEMORY;
  }
}

// parallel_for, where body(begin, end) may run out of memory: no exception leaves a thread either.
template <class Body>
ElvaStatus for_pieces(int64_t items, int64_t grain, int threads, const Body& body) {
  std::atomic<ElvaStatus> status{ELVA_OK};
  parallel_for(items, grain, threads, [&](int64_t begin, int64_t end) {
    const ElvaStatus found = within_memory([&] {
      body(begin, end);
      return ELVA_OK;
    });
    if (found != ELVA_OK) status = found;
  });
  return status;
}

}  // namespace elva
#endif  // ELVA_CPU_PARALLEL_H_
