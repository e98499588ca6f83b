// Loops over several threads: those of the OpenMP runtime that torch has loaded, where there is
// one, else a small pool of our own that sleeps when it has nothing to do. Never a second OpenMP
// runtime: the two would spin against each other.
#ifndef ELVA_CPU_PARALLEL_H_
#define ELVA_CPU_PARALLEL_H_

#include <stdint.h>

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

}  // namespace elva
#endif  // ELVA_CPU_PARALLEL_H_
