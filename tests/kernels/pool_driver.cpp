// Calls the thread pool as a program may, for ThreadSanitizer: from several threads at once, from
// inside a piece, in children of a fork, at the process's end. Exits with 0 where every item was
// worked on once; the sanitizer speaks otherwise.
//
// Arguments: the seed of the sizes; how many children are forked beside other callers, 0 for none.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "cpu/parallel.h"
#include "elva.h"

namespace {

// Sums of what pieces have written, in memory that they alone make visible to the caller.
void one_loop(std::mt19937* random) {
  const int64_t items = static_cast<int64_t>((*random)() % 3000);
  const int64_t grain = static_cast<int64_t>((*random)() % 64);
  const int threads = static_cast<int>((*random)() % 5);
  const bool nested = (*random)() % 8 == 0, full = (*random)() % 8 == 0;
  std::vector<int64_t> times(static_cast<size_t>(items));
  int64_t factor = 3;  // written before the loop, read by its threads, written again behind it
  ElvaBlock block = {};
  if (elva_acquire_block(items + 1, &block) != ELVA_OK) abort();
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) times[static_cast<size_t>(i)] += factor;
    if (nested) elva::parallel_for(end - begin, 1, 2, [](int64_t, int64_t) {});
    if (full && begin == 0) throw std::bad_alloc();
  };
  const ElvaStatus status = elva::for_pieces(items, grain, threads, body);
  factor = 0;
  static_cast<char*>(block.data)[items] = 1;
  elva_release_block(&block);
  for (int64_t found : times) {
    if (found != 3) abort();
  }
  if (status != (full && items > 0 ? ELVA_OUT_OF_MEMORY : ELVA_OK)) abort();
}

void many_loops(unsigned seed, int count) {
  std::mt19937 random(seed);
  for (int i = 0; i < count; ++i) one_loop(&random);
}

// Of a child of a fork that calls too: whether it ends, and well.
template <class Work>
void in_a_child(const Work& work) {
  const pid_t child = fork();
  if (child < 0) abort();
  if (child == 0) {
    alarm(60);  // a child that waits for a thread which it does not have would do so for ever
    work();
    _exit(0);
  }
  int status = 0;
  if (waitpid(child, &status, 0) != child || status != 0) abort();
}

// Forks in a process whose first call is on its way.
void forked_at_first(unsigned seed) {
  for (unsigned i = 0; i < 40; ++i) {
    in_a_child([=] {
      std::thread first(many_loops, seed + i, 2);
      const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(5 * i);
      while (std::chrono::steady_clock::now() < end) {
      }
      in_a_child([=] { many_loops(seed + i, 2); });
      first.join();
    });
  }
}

}  // namespace

int main(int argc, char** arguments) {
  if (argc != 3) return 2;
  const auto seed = 64 * static_cast<unsigned>(std::strtoul(arguments[1], nullptr, 10));
  const int forks = std::atoi(arguments[2]);
  // The first exception has libgcc prepare itself under a lock of its own, which a fork may leave
  // held: that is not the pool's.
  if (elva::within_memory([]() -> ElvaStatus { throw std::bad_alloc(); }) == ELVA_OK) abort();
  if (forks > 0) forked_at_first(seed);
  std::vector<std::thread> callers;
  for (unsigned i = 0; i < 3; ++i) callers.emplace_back(many_loops, seed + 40 + i, 300);
  for (int i = 0; i < forks; ++i) in_a_child([=] { many_loops(seed + 43, 20); });
  for (auto& caller : callers) caller.join();
  std::thread([=] { many_loops(seed + 44, 1 << 30); }).detach();  // until the process ends
  many_loops(seed + 45, 50);
  std::puts("each once");
  return 0;
}
