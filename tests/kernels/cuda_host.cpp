// The fibers of cuda_host.h. ELVA_HOST_ORDER: forwards, reversed, or the seed of a shuffle.
// ELVA_HOST_CAPABILITY: the compute capability's first number. ELVA_HOST_SHARED_KB: what a block may
// have. ELVA_HOST_FAIL=1: launches fail.
#include "cuda_host.h"

#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace host {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kWarp = 32;

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "cuda_host: %s\n", what);
  abort();
}

// Threads that wait for one another.
struct Meeting {
  int members = 0, here = 0, any = 0, seen = 0;
  uint32_t generation = 0;
};

struct Block {
  std::unique_ptr<unsigned char, decltype(&free)> memory{nullptr, &free};
  size_t bytes = 0;
  Meeting meeting;
};

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
  Arrivals* arrivals;
};

struct Send {
  void* to;
  float2 value;
  Arrivals* arrivals;
};

struct Copy16 {
  void* to;
  const void* from;
  size_t bytes;
};

// What __builtin_setjmp keeps. It makes no system call, as swapcontext does at each switch.
using Place = void* [5];

struct Fiber {
  Self self;
  ucontext_t beginning;
  Place place;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  void* fake_stack = nullptr;
  const uint32_t* awaited = nullptr;  // goes on when this is no longer that
  uint32_t value = 0;
  size_t block = 0, warp = 0;
  std::vector<Copy16> copies;  // not committed
  std::deque<std::vector<Copy16>> groups;
  bool begun = false, done = false;
};

struct Warp {
  Meeting meeting;
  uint64_t words[kWarp] = {};
  uint32_t left[kWarp][4] = {}, right[kWarp][2] = {};
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Block> blocks;
  std::vector<Warp> warps;
  std::vector<Copy> copies;
  std::vector<Send> sends;
  Meeting cluster;
  Place scheduler;
  void* scheduler_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
  size_t current = 0;
  bool progress = false;
  std::mt19937 random;
  const std::function<void()>* body = nullptr;

  Fiber& fiber() { return *fibers[current]; }
};
Machine machine;

void before_switch(void** fake, const void* bottom, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake, bottom, size);
#else
  (void)fake, (void)bottom, (void)size;
#endif
}
void after_switch(void* fake, const void** bottom, size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, bottom, size);
#else
  (void)fake, (void)bottom, (void)size;
#endif
}

// The sanitizer would forget at a jump what it knows of the frames that are left. And a function
// that jumps may not be one that is jumped to.
#define ELVA_JUMPS __attribute__((noinline, no_sanitize("address")))

[[noreturn]] ELVA_JUMPS void jump(void** place) { __builtin_longjmp(place, 1); }

ELVA_JUMPS void to_scheduler(Fiber* fiber) {
  if (__builtin_setjmp(fiber->place) == 0) jump(machine.scheduler);
}

ELVA_JUMPS void to_fiber(Fiber* fiber) {
  if (__builtin_setjmp(machine.scheduler) != 0) return;
  if (fiber->begun) jump(fiber->place);
  fiber->begun = true;
  setcontext(&fiber->beginning);
}

// Until *word is not `value`.
void wait_while(const uint32_t* word, uint32_t value) {
  Fiber& fiber = machine.fiber();
  fiber.awaited = word;
  fiber.value = value;
  while (*word == value) {
    before_switch(&fiber.fake_stack, machine.scheduler_bottom, machine.scheduler_size);
    to_scheduler(&fiber);
    after_switch(fiber.fake_stack, nullptr, nullptr);
  }
  fiber.awaited = nullptr;
}

void run_body() {
  after_switch(nullptr, &machine.scheduler_bottom, &machine.scheduler_size);
  (*machine.body)();
  machine.fiber().done = machine.progress = true;
  before_switch(nullptr, machine.scheduler_bottom, machine.scheduler_size);
  jump(machine.scheduler);
}

int meet(Meeting* meeting, int x = 0) {
  const uint32_t generation = meeting->generation;
  meeting->any |= x;
  if (++meeting->here == meeting->members) {
    meeting->seen = meeting->any;
    meeting->any = meeting->here = 0;
    ++meeting->generation;
    machine.progress = true;
  }
  wait_while(&meeting->generation, generation);
  return meeting->seen;
}

void arrive(Arrivals* arrivals, uint32_t bytes) {
  arrivals->pending -= static_cast<int32_t>(bytes);
  if (arrivals->pending == 0) arrivals->phase ^= 1;
}

void carry_out(size_t i) {
  const Copy copy = machine.copies[i];
  machine.copies.erase(machine.copies.begin() + static_cast<ptrdiff_t>(i));
  memcpy(copy.to, copy.from, copy.bytes);
  arrive(copy.arrivals, copy.bytes);
  machine.progress = true;
}

// Some of what was sent.
void deliver() {
  std::vector<Send> later;
  for (const Send& send : machine.sends) {
    if (machine.random() % 2 == 0) {
      later.push_back(send);
      continue;
    }
    memcpy(send.to, &send.value, sizeof(send.value));
    arrive(send.arrivals, sizeof(send.value));
  }
  machine.progress |= !machine.sends.empty();
  machine.sends = std::move(later);
}

void check_aligned(const void* p, const void* q, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0 || reinterpret_cast<uintptr_t>(q) % 16 != 0 ||
      bytes % 16 != 0 || bytes == 0) {
    fail("a bulk copy is not of multiples of 16 bytes");
  }
}

// The order of `count` fibers in a round.
std::vector<size_t> order_of(size_t count) {
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  const char* wish = getenv("ELVA_HOST_ORDER");
  if (wish == nullptr || strcmp(wish, "forwards") == 0) return order;
  if (strcmp(wish, "reversed") == 0) {
    std::reverse(order.begin(), order.end());
  } else {
    std::shuffle(order.begin(), order.end(), machine.random);
  }
  return order;
}

void start(size_t i) {
  Fiber& fiber = *machine.fibers[i];
  fiber.begun = fiber.done = false;
  getcontext(&fiber.beginning);
  fiber.beginning.uc_stack.ss_sp = fiber.stack.data();
  fiber.beginning.uc_stack.ss_size = fiber.stack.size();
  fiber.beginning.uc_link = nullptr;
  makecontext(&fiber.beginning, run_body, 0);
}

void run_cluster(size_t first_block, size_t blocks, const cudaLaunchConfig_t& config) {
  const size_t threads = config.blockDim.x, warps = (threads + kWarp - 1) / kWarp;
  machine.blocks = std::vector<Block>(blocks);
  machine.warps = std::vector<Warp>(blocks * warps);
  machine.cluster = Meeting{static_cast<int>(blocks * threads)};
  while (machine.fibers.size() < blocks * threads) machine.fibers.emplace_back(new Fiber);
  for (size_t b = 0; b < blocks; ++b) {
    Block& block = machine.blocks[b];
    block.bytes = config.dynamicSmemBytes;
    const size_t room = (block.bytes + 127) / 128 * 128;
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, room == 0 ? 128 : room) != 0) fail("no memory");
    block.memory.reset(static_cast<unsigned char*>(memory));
    memset(memory, 0xff, room);
    block.meeting.members = static_cast<int>(threads);
    for (size_t t = 0; t < threads; ++t) {
      Fiber& fiber = *machine.fibers[b * threads + t];
      fiber.self.thread.x = static_cast<unsigned>(t);
      fiber.self.block.x = static_cast<unsigned>(first_block + b);
      fiber.self.block_dim = config.blockDim;
      fiber.self.grid_dim = config.gridDim;
      fiber.block = b;
      fiber.warp = b * warps + t / kWarp;
      machine.warps[fiber.warp].meeting.members += 1;
      start(b * threads + t);
    }
  }
  size_t left = blocks * threads;
  while (left > 0) {
    machine.progress = false;
    for (size_t i : order_of(blocks * threads)) {
      Fiber& fiber = *machine.fibers[i];
      if (fiber.done || (fiber.awaited != nullptr && *fiber.awaited == fiber.value)) continue;
      machine.current = i;
      before_switch(&machine.scheduler_stack, fiber.stack.data(), fiber.stack.size());
      to_fiber(&fiber);
      after_switch(machine.scheduler_stack, nullptr, nullptr);
      left -= fiber.done ? 1 : 0;
      if (fiber.done && !(fiber.copies.empty() && fiber.groups.empty())) {
        fail("a thread ended before its copies");
      }
    }
    if (!machine.copies.empty()) carry_out(machine.random() % machine.copies.size());
    deliver();
    if (!machine.progress) fail("threads wait for one another for ever");
  }
  if (!machine.copies.empty()) fail("a block ended before its loads");
  if (!machine.sends.empty()) fail("a block ended before what was sent to it arrived");
}

}  // namespace

float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  memcpy(&x, &wide, sizeof(x));
  return x;
}
float from_fp16(uint16_t bits) {
  _Float16 x;
  memcpy(&x, &bits, sizeof(x));
  return static_cast<float>(x);
}
// Rounded once: to odd first, then to nearest even.
uint16_t to_bf16(double x) {
  if (isnan(x)) return 0x7fff;
  float narrow = static_cast<float>(x);
  uint32_t bits;
  if (isfinite(narrow) && static_cast<double>(narrow) != x) {
    if (fabs(static_cast<double>(narrow)) > fabs(x)) narrow = nextafterf(narrow, 0.0f);
    memcpy(&bits, &narrow, sizeof(bits));
    bits |= 1;
  } else {
    memcpy(&bits, &narrow, sizeof(bits));
  }
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
uint16_t to_fp16(double x) {
  const _Float16 narrow = static_cast<_Float16>(x);
  uint16_t bits;
  memcpy(&bits, &narrow, sizeof(bits));
  return bits;
}

const Self& self() { return machine.fiber().self; }
unsigned char* shared_memory() { return machine.blocks[machine.fiber().block].memory.get(); }
void sync_block() { meet(&machine.blocks[machine.fiber().block].meeting); }
int sync_block_or(int x) { return meet(&machine.blocks[machine.fiber().block].meeting, x); }
void sync_warp() { meet(&machine.warps[machine.fiber().warp].meeting); }
int sync_warp_or(int x) { return meet(&machine.warps[machine.fiber().warp].meeting, x); }
void cluster_sync() { meet(&machine.cluster); }
uint32_t cluster_rank() { return static_cast<uint32_t>(machine.fiber().block); }

unsigned own_lane() { return machine.fiber().self.thread.x % kWarp; }

uint64_t exchange(uint64_t x, int lane_mask) {
  return take(x, static_cast<int>(own_lane()) ^ lane_mask);
}

uint64_t take(uint64_t x, int lane) {
  Warp& warp = machine.warps[machine.fiber().warp];
  warp.words[own_lane()] = x;
  sync_warp();
  const uint64_t other = warp.words[lane];
  sync_warp();
  return other;
}

// Fragments as PTX lays out m16n8k16: a holds (row, terms) (g, 2t), (g + 8, 2t), (g, 2t + 8) and
// (g + 8, 2t + 8), each with the next term; b the terms 2t and 2t + 8 of column g; g = lane / 4,
// t = lane % 4. The lane's sums are (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
void multiply_add(float* sum, const uint32_t* a, const uint32_t* b, bool bf16) {
  Warp& warp = machine.warps[machine.fiber().warp];
  const unsigned lane = own_lane();
  memcpy(warp.left[lane], a, sizeof(warp.left[lane]));
  memcpy(warp.right[lane], b, sizeof(warp.right[lane]));
  sync_warp();
  const auto element = [bf16](uint32_t word, unsigned term) {
    const uint16_t bits = static_cast<uint16_t>(term % 2 == 0 ? word : word >> 16);
    return bf16 ? from_bf16(bits) : from_fp16(bits);
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double total = static_cast<double>(sum[i]);
    for (unsigned term = 0; term < 16; ++term) {
      const unsigned t = term % 8 / 2, high = term / 8;
      const uint32_t left = warp.left[row % 8 * 4 + t][row / 8 + 2 * high];
      const uint32_t right = warp.right[column * 4 + t][high];
      total += static_cast<double>(element(left, term)) * static_cast<double>(element(right, term));
    }
    sum[i] = static_cast<float>(total);
  }
  sync_warp();
}

// The same of m16n8k32: a word holds four terms.
void multiply_add(int32_t* sum, const uint32_t* a, const uint32_t* b) {
  Warp& warp = machine.warps[machine.fiber().warp];
  const unsigned lane = own_lane();
  memcpy(warp.left[lane], a, sizeof(warp.left[lane]));
  memcpy(warp.right[lane], b, sizeof(warp.right[lane]));
  sync_warp();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned word = 0; word < 8; ++word) {
      const unsigned t = word % 4, high = word / 4;
      const uint32_t left = warp.left[row % 8 * 4 + t][row / 8 + 2 * high];
      const uint32_t right = warp.right[column * 4 + t][high];
      for (unsigned term = 0; term < 32; term += 8)
        sum[i] += static_cast<int8_t>(left >> term) * static_cast<int8_t>(right >> term);
    }
  }
  sync_warp();
}

void Arrivals::expect(uint32_t bytes) {
  pending += static_cast<int32_t>(bytes);
  if (pending == 0) phase ^= 1;
}
void Arrivals::wait(uint32_t parity) { wait_while(&phase, parity); }

// As late as they may come.
void copy16(void* shared, const void* global, int bytes) {
  check_aligned(shared, global, 16);
  machine.fiber().copies.push_back({shared, global, static_cast<size_t>(bytes)});
}
void commit_copies() {
  Fiber& fiber = machine.fiber();
  fiber.groups.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}
void wait_copies(int pending) {
  std::deque<std::vector<Copy16>>& groups = machine.fiber().groups;
  for (; groups.size() > static_cast<size_t>(pending); groups.pop_front()) {
    for (const Copy16& copy : groups.front()) {
      memset(copy.to, 0, 16);
      memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

void bulk_load(void* shared, const void* global, uint32_t bytes, Arrivals* arrivals) {
  check_aligned(shared, global, bytes);
  machine.copies.push_back({shared, global, bytes, arrivals});
}
bool describe_boxes(RowBoxes* boxes, const void* data, int64_t words, int64_t rows,
                    int64_t row_stride, int64_t, int64_t group_stride, int64_t box_words) {
  check_aligned(data, nullptr, 16);
  if (row_stride % 16 != 0 || group_stride % 16 != 0) fail("a stride is no multiple of 16 bytes");
  if (box_words > 256 || rows > 256) return false;
  *boxes = {
      static_cast<const unsigned char*>(data), words, rows, row_stride, group_stride, box_words};
  return true;
}
void box_load(void* shared, const RowBoxes* boxes, int word, int group, Arrivals* arrivals) {
  if (reinterpret_cast<uintptr_t>(shared) % 128 != 0) fail("a box is not on 128 bytes");
  const int64_t left = boxes->words - word,
                there = left < boxes->box_words ? left : boxes->box_words;
  const uint32_t bytes = static_cast<uint32_t>(there * 4),
                 zeros = static_cast<uint32_t>(boxes->box_words * 4) - bytes;
  auto* to = static_cast<unsigned char*>(shared);
  for (int64_t row = 0; row < boxes->rows; ++row, to += bytes + zeros) {
    const unsigned char* from = boxes->data + group * boxes->group_stride + row * boxes->row_stride;
    bulk_load(to, from + word * 4, bytes, arrivals);
    memset(to + bytes, 0, zeros);
    if (zeros > 0) arrive(arrivals, zeros);
  }
}

void cluster_send(float2* p, uint32_t rank, float2 x, Arrivals* arrivals) {
  if (rank >= machine.blocks.size()) fail("no such block in the cluster");
  const Block& own = machine.blocks[machine.fiber().block];
  const auto there = [&](void* here, size_t bytes) -> void* {
    const auto offset = static_cast<unsigned char*>(here) - own.memory.get();
    if (offset < 0 || static_cast<size_t>(offset) + bytes > own.bytes) fail("a store is outside");
    return machine.blocks[rank].memory.get() + offset;
  };
  machine.sends.push_back(
      {there(p, sizeof(x)), x, static_cast<Arrivals*>(there(arrivals, sizeof(*arrivals)))});
}

int capability() {
  const char* wish = getenv("ELVA_HOST_CAPABILITY");
  return wish == nullptr ? 9 : atoi(wish);
}

int most_shared() {
  const char* wish = getenv("ELVA_HOST_SHARED_KB");
  return (wish == nullptr ? 227 : atoi(wish)) << 10;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  const char* wish = getenv("ELVA_HOST_FAIL");
  if (wish != nullptr && strcmp(wish, "1") == 0) return cudaErrorLaunchFailure;
  const char* order = getenv("ELVA_HOST_ORDER");
  machine.random.seed(order == nullptr ? 0 : static_cast<unsigned>(atoi(order)));
  machine.body = &body;
  const size_t cluster = config.numAttrs == 0 ? 1 : config.attrs[0].val.clusterDim.x;
  if (config.gridDim.x % cluster != 0) fail("the grid is not whole clusters");
  for (size_t b = 0; b < config.gridDim.x; b += cluster) run_cluster(b, cluster, config);
  return cudaSuccess;
}

}  // namespace host
