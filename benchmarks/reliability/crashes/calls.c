// What: the calls by which files under a directory change, counted; the n-th fails, or kills.
// Use: preloaded into a process; elva_calls_at() arms it, elva_calls() tells how many there were.
// A write that fails or kills has written half of its bytes before, as on a disk that fills up.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char under[PATH_MAX];
static long calls, nth;
static int number;  // of the error; 0 kills
static const char* refused = "";

// Arm for the calls under a directory, or disarm for "". `error` 0: the n-th kills.
void elva_calls_at(const char* directory, long n, int error) {
  calls = 0, nth = n, number = error, refused = "";
  snprintf(under, sizeof under, "%s", directory);
}

long elva_calls(void) { return calls; }

// The name of the call that failed; "" before.
const char* elva_refused(void) { return refused; }

static int due(const char* path) {
  return *under && !strncmp(path, under, strlen(under)) && ++calls == nth;
}

static int due_at(int directory, const char* path) {
  char link[64], full[PATH_MAX];
  if (path && *path == '/') return due(path);
  if (directory == AT_FDCWD) return 0;  // paths here are absolute
  snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
  ssize_t n = readlink(link, full, sizeof full - 1);
  if (n < 0) return 0;
  full[n] = 0;
  return due(full);
}

static int refuse(const char* name) {
  refused = name;
  if (!number) kill(getpid(), SIGKILL);
  errno = number;
  return -1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define REFUSED(condition) \
  if (*under && (condition)) return refuse(__func__)

ssize_t write(int fd, const void* from, size_t n) {
  if (*under && due_at(fd, NULL)) {
    if (n > 1) REAL(write)(fd, from, n / 2);
    return refuse("write");
  }
  return REAL(write)(fd, from, n);
}

ssize_t pwrite(int fd, const void* from, size_t n, off_t at) {
  REFUSED(due_at(fd, NULL));
  return REAL(pwrite)(fd, from, n, at);
}

ssize_t pwrite64(int fd, const void* from, size_t n, off64_t at) {
  REFUSED(due_at(fd, NULL));
  return REAL(pwrite64)(fd, from, n, at);
}

ssize_t writev(int fd, const struct iovec* from, int n) {
  REFUSED(due_at(fd, NULL));
  return REAL(writev)(fd, from, n);
}

int fsync(int fd) {
  REFUSED(due_at(fd, NULL));
  return REAL(fsync)(fd);
}

int fdatasync(int fd) {
  REFUSED(due_at(fd, NULL));
  return REAL(fdatasync)(fd);
}

int ftruncate(int fd, off_t n) {
  REFUSED(due_at(fd, NULL));
  return REAL(ftruncate)(fd, n);
}

int ftruncate64(int fd, off64_t n) {
  REFUSED(due_at(fd, NULL));
  return REAL(ftruncate64)(fd, n);
}

int rename(const char* from, const char* to) {
  REFUSED(due(to));
  return REAL(rename)(from, to);
}

int renameat(int a, const char* from, int b, const char* to) {
  REFUSED(due_at(b, to));
  return REAL(renameat)(a, from, b, to);
}

int link(const char* from, const char* to) {
  REFUSED(due(to));
  return REAL(link)(from, to);
}

int linkat(int a, const char* from, int b, const char* to, int flags) {
  REFUSED(due_at(b, to));
  return REAL(linkat)(a, from, b, to, flags);
}

int mkdir(const char* path, mode_t mode) {
  REFUSED(due(path));
  return REAL(mkdir)(path, mode);
}

// Removals are where a kill may come; that they fail is no failing write.

int unlink(const char* path) {
  REFUSED(!number && due(path));
  return REAL(unlink)(path);
}

int unlinkat(int at, const char* path, int flags) {
  REFUSED(!number && due_at(at, path));
  return REAL(unlinkat)(at, path, flags);
}

int rmdir(const char* path) {
  REFUSED(!number && due(path));
  return REAL(rmdir)(path);
}

#define OPENS(name, before, arguments, changed)          \
  int name before {                                      \
    mode_t mode = 0;                                     \
    if (flags & (O_CREAT | O_TMPFILE)) {                 \
      va_list rest;                                      \
      va_start(rest, flags);                             \
      mode = va_arg(rest, mode_t);                       \
      va_end(rest);                                      \
    }                                                    \
    REFUSED((flags & (O_CREAT | O_TRUNC)) && (changed)); \
    return REAL(name) arguments;                         \
  }

OPENS(open, (const char* path, int flags, ...), (path, flags, mode), due(path))
OPENS(open64, (const char* path, int flags, ...), (path, flags, mode), due(path))
OPENS(openat, (int at, const char* path, int flags, ...), (at, path, flags, mode), due_at(at, path))
OPENS(openat64, (int at, const char* path, int flags, ...), (at, path, flags, mode),
      due_at(at, path))
