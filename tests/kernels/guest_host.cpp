// The host of guest.h, preloaded into a process: its memory, all of it from the arena, and the C API
// of csrc/cpu, of which each function asks the guest. ELVA_TEST_GUEST is the guest's command line.
#include <spawn.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include "guest.h"

extern char** environ;

namespace {

// Before each block; blocks are powers of two, and free ones of a size form a list.
struct Header {
  uint64_t exponent;
  char* block;
};
constexpr size_t kAlignment = 64;
constexpr int kExponents = 40;

int arena_descriptor = -1;
char* unused = nullptr;
char* free_blocks[kExponents] = {};
std::atomic_flag busy = ATOMIC_FLAG_INIT;

void map_arena() {
  arena_descriptor = memfd_create("arena", 0);
  void* at = reinterpret_cast<void*>(kArena);
  if (arena_descriptor < 0 || ftruncate(arena_descriptor, kArenaBytes) != 0) abort();
  if (mmap(at, kArenaBytes, PROT_READ | PROT_WRITE,
           MAP_SHARED | MAP_FIXED_NOREPLACE | MAP_NORESERVE, arena_descriptor, 0) != at)
    abort();
  unused = static_cast<char*>(at);
}

Header* header_of(void* p) { return reinterpret_cast<Header*>(p) - 1; }

void* allocate(size_t bytes, size_t alignment) {
  alignment = std::max(alignment, kAlignment);
  const size_t wanted = bytes + alignment;  // the header fits into the smallest alignment
  int exponent = 7;
  while ((size_t{1} << exponent) < wanted) ++exponent;
  while (busy.test_and_set(std::memory_order_acquire)) {
  }
  if (unused == nullptr) map_arena();
  char* block = free_blocks[exponent];
  if (block != nullptr) {
    memcpy(&free_blocks[exponent], block, sizeof(block));
  } else if (kArena + kArenaBytes - reinterpret_cast<uint64_t>(unused) > size_t{1} << exponent) {
    block = unused;
    unused += size_t{1} << exponent;
  }
  busy.clear(std::memory_order_release);
  if (block == nullptr) return nullptr;
  const auto first = reinterpret_cast<uint64_t>(block) + kAlignment;
  char* p = reinterpret_cast<char*>((first + alignment - 1) / alignment * alignment);
  *header_of(p) = {static_cast<uint64_t>(exponent), block};
  return p;
}

bool ours(void* p) {
  const auto at = reinterpret_cast<uint64_t>(p);
  return at >= kArena && at < kArena + kArenaBytes;
}

size_t room_at(void* p) {
  const Header* header = header_of(p);
  return (size_t{1} << header->exponent) -
         static_cast<size_t>(static_cast<char*>(p) - header->block);
}

}  // namespace

extern "C" {

void* malloc(size_t bytes) { return allocate(bytes, 1); }
void free(void* p) {
  if (!ours(p)) return;  // null, or the loader's
  const Header header = *header_of(p);
  while (busy.test_and_set(std::memory_order_acquire)) {
  }
  memcpy(header.block, &free_blocks[header.exponent], sizeof(char*));
  free_blocks[header.exponent] = header.block;
  busy.clear(std::memory_order_release);
}
void* calloc(size_t count, size_t size) {
  size_t bytes;
  if (__builtin_mul_overflow(count, size, &bytes)) return nullptr;
  void* p = allocate(bytes, 1);
  return p == nullptr ? nullptr : memset(p, 0, bytes);
}
void* realloc(void* p, size_t bytes) {
  if (p == nullptr) return allocate(bytes, 1);
  const size_t room = room_at(p);
  if (bytes <= room) return p;
  void* larger = allocate(bytes, 1);
  if (larger == nullptr) return nullptr;
  memcpy(larger, p, room);
  free(p);
  return larger;
}
void* memalign(size_t alignment, size_t bytes) { return allocate(bytes, alignment); }
void* aligned_alloc(size_t alignment, size_t bytes) { return allocate(bytes, alignment); }
int posix_memalign(void** out, size_t alignment, size_t bytes) {
  *out = allocate(bytes, alignment);
  return *out == nullptr ? ENOMEM : 0;
}
size_t malloc_usable_size(void* p) { return p == nullptr ? 0 : room_at(p); }

}  // extern "C"

namespace {

// The guest's process, begun with the first call.
class Guest {
 public:
  Guest() {
    int sockets[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) != 0) abort();
    socket_ = sockets[0];
    std::istringstream line(getenv("ELVA_TEST_GUEST"));
    std::vector<std::string> words;
    for (std::string word; line >> word;) words.push_back(word);
    words.push_back(std::to_string(arena_descriptor));
    words.push_back(std::to_string(sockets[1]));
    std::vector<char*> command, variables;
    for (std::string& word : words) command.push_back(word.data());
    command.push_back(nullptr);
    for (char** variable = environ; *variable != nullptr; ++variable) {
      if (strncmp(*variable, "LD_PRELOAD=", 11) != 0) variables.push_back(*variable);
    }
    variables.push_back(nullptr);
    pid_t process;
    if (posix_spawnp(&process, command[0], nullptr, nullptr, command.data(), variables.data()) != 0)
      abort();
    close(sockets[1]);  // so that a guest that ends is noticed
  }

  template <class Args>
  ElvaStatus ask(int32_t op, const Args* args) {
    const std::lock_guard<std::mutex> turn(turn_);
    auto* copy = static_cast<Args*>(malloc(sizeof(Args)));  // args may lie on a thread's stack
    memcpy(copy, args, sizeof(Args));
    const Call call = {op, sizeof(Args), reinterpret_cast<uint64_t>(copy)};
    ElvaStatus status;
    if (write(socket_, &call, sizeof(call)) != sizeof(call) ||
        read(socket_, &status, sizeof(status)) != sizeof(status)) {
      fprintf(stderr, "the guest ended in op %d\n", op);
      _exit(70);
    }
    if (op == kOp_level) memcpy(const_cast<Args*>(args), copy, sizeof(Args));
    free(copy);
    return status;
  }

 private:
  std::mutex turn_;
  int socket_;
};

Guest& guest() {
  static Guest* guest = new Guest;
  return *guest;
}

Levels levels_now() {
  Levels levels = {};
  const char* forced = getenv("ELVA_KERNELS_CPU_LEVEL");
  if (forced != nullptr) snprintf(levels.forced, sizeof(levels.forced), "%s", forced);
  guest().ask(kOp_level, &levels);
  return levels;
}

Levels& known_levels() {
  static Levels levels = levels_now();
  return levels;
}

}  // namespace

extern "C" {

#define ELVA_GUEST_ASK(op, Args) \
  ElvaStatus elva_##op##_cpu(const Args* args) { return guest().ask(kOp_##op, args); }
ELVA_GUEST_OPS(ELVA_GUEST_ASK)

const char* elva_cpu_level(void) {
  const char* level = known_levels().level;
  return *level == 0 ? nullptr : level;
}
const char* elva_cpu_level_error(void) { return known_levels().error; }
const char* elva_cpu_levels(void) { return known_levels().levels; }
void elva_cpu_level_reset(void) { known_levels() = levels_now(); }
bool elva_multiplies_bf16(void) { return known_levels().multiplies_bf16; }

}  // extern "C"
