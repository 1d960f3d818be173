// File: tests/child.h
//
// Children of fork() in tests.
#ifndef PYKD_TESTS_CHILD_H_
#define PYKD_TESTS_CHILD_H_

#include <sys/wait.h>
#include <unistd.h>

namespace pykd::tests {

// Whether a child may be made while other threads are at work. The C library holds its own locks across fork(); the
// run-time libraries of the sanitizers (gcc 12) do not. ThreadSanitizer follows no child of a process with threads, and
// AddressSanitizer's child finds a lock of its allocator taken for ever where a thread that the child does not have was
// allocating: a new thread then hangs before its first line (pthread_getattr_np() in AsanThread::Init()).
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr bool kForksWhileThreadsWork = false;
#else
constexpr bool kForksWhileThreadsWork = true;
#endif
#define PYKD_SKIP_WHERE_CHILDREN_HANG()                              \
  if (!::pykd::tests::kForksWhileThreadsWork)                        \
  GTEST_SKIP() << "a sanitizer's child would wait for its parent's " \
                  "threads"

// What waitpid() says of a child that ends with 0 where `body` returns true, with 1 where it does not, and with SIGALRM
// where it hangs; -1 where there is no child.
template <class Body>
int status_of_child(const Body& body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(120);
    _exit(body() ? 0 : 1);
  }
  int status = -1;
  return child > 0 && waitpid(child, &status, 0) == child ? status : -1;
}

}  // namespace pykd::tests

#endif  // PYKD_TESTS_CHILD_H_
