// File: kernels/cuda/fibers.h
//
// The threads of an emulated GPU, without threads: each runs on a stack of its own until it has to wait for others,
// and then another one does. For some time the one that was woken last, so that a warp runs as far ahead of the others
// as barriers let it, and then for some time any, by lot: what a missing barrier leaves to chance is not always the
// same. The lots are the same in every run, so that a failure comes again.
//
// The sanitizers are told of every change of stacks. For ThreadSanitizer fibers are threads, ordered by nothing but
// happens_before() and happens_after().
#ifndef PYKD_KERNELS_CUDA_FIBERS_H_
#define PYKD_KERNELS_CUDA_FIBERS_H_

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
// Parts of the same library that its header does not declare.
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif

namespace pykd::kernels::gpu {

#if defined(__SANITIZE_THREAD__)
inline void happens_before(void* event) { __tsan_release(event); }
inline void happens_after(void* event) { __tsan_acquire(event); }
// While one lives, what is done is not the kernel's doing.
struct Aside {
  Aside() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Aside() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Aside(const Aside&) = delete;
  Aside& operator=(const Aside&) = delete;
};
#else
inline void happens_before(void*) {}
inline void happens_after(void*) {}
struct Aside {
  Aside() {}  // so that it is used
};
#endif

class Fibers {
  struct Fiber {
    ucontext_t context{};
    std::unique_ptr<char[]> stack;
    std::function<void()> body;
    const void* bottom = nullptr;  // of the stack, for AddressSanitizer
    std::size_t size = 0;
    void* of_sanitizer = nullptr;
  };

 public:
  // Those that wait for the same.
  using Sleepers = std::vector<Fiber*>;

  Fibers() = default;
  Fibers(const Fibers&) = delete;
  Fibers& operator=(const Fibers&) = delete;

  void add(std::function<void()> body) {
    auto fiber = std::make_unique<Fiber>();
    fiber->body = std::move(body);
    fibers_.push_back(std::move(fiber));
  }

  // Runs all of them until each has ended.
  void run() {
    for (const auto& fiber : fibers_) {
      begin(*fiber);
      ready_.push_back(fiber.get());
    }
#if defined(__SANITIZE_THREAD__)
    main_.of_sanitizer = __tsan_get_current_fiber();
#endif
    running_ = &main_;
    happens_before(this);
    to_next(false);
    happens_after(this);
    const bool stuck = ended_ < fibers_.size();
    for (const auto& fiber : fibers_) {
#if defined(__SANITIZE_THREAD__)
      __tsan_destroy_fiber(fiber->of_sanitizer);
#endif
      if (!stuck) stacks().push_back(std::move(fiber->stack));
    }
    if (stuck) throw std::logic_error("threads of an emulated GPU wait for what never comes");
  }

  // The one that runs waits among these, until somebody wakes them.
  void sleep(Sleepers& sleepers) {
    sleepers.push_back(running_);
    to_next(false);
  }
  void wake(Sleepers& sleepers) {
    ready_.insert(ready_.end(), sleepers.begin(), sleepers.end());
    sleepers.clear();
  }

 private:
  static constexpr std::size_t kStack = 64 << 10;
  static constexpr unsigned kTurns = 1000;  // after which the next ones are chosen in the other way

  // Stacks of earlier runs: a new one costs more than what most kernels do on it.
  static std::vector<std::unique_ptr<char[]>>& stacks() {
    static thread_local std::vector<std::unique_ptr<char[]>> kept;
    return kept;
  }

  void begin(Fiber& fiber) {
    if (stacks().empty()) {
      fiber.stack.reset(new char[kStack]);
    } else {
      fiber.stack = std::move(stacks().back());
      stacks().pop_back();
    }
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;  // on_new_stack() never returns
    fiber.bottom = fiber.stack.get();
    fiber.size = kStack;
#if defined(__SANITIZE_THREAD__)
    fiber.of_sanitizer = __tsan_create_fiber(0);
#endif
    starting() = this;
    makecontext(&fiber.context, &Fibers::on_new_stack, 0);
  }

  // makecontext() passes nothing but whole numbers.
  static Fibers*& starting() {
    static thread_local Fibers* fibers = nullptr;
    return fibers;
  }

  static void on_new_stack() {
    Fibers* fibers = nullptr;
    Fiber* fiber = nullptr;
    {
      const Aside aside;
      fibers = starting();
      fiber = fibers->running_;
      fibers->arrived(nullptr);
    }
    happens_after(fibers);
    fiber->body();
    happens_before(fibers);
    {
      const Aside aside;
      ++fibers->ended_;
    }
    fibers->to_next(true);
  }

  // Goes to one that is ready, or back to run() where none is; returns when it is the running one's turn again.
  void to_next([[maybe_unused]] bool ended) {
    Fiber *left = nullptr, *next = &main_;
    [[maybe_unused]] void* of_sanitizer = nullptr;
    {
      const Aside aside;
      if (!ready_.empty()) {
        if (turns_++ / kTurns % 2 == 1) std::swap(ready_[lots_() % ready_.size()], ready_.back());
        next = ready_.back();
        ready_.pop_back();
      }
      left = std::exchange(running_, next);
      of_sanitizer = next->of_sanitizer;
    }
    void* fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(ended ? nullptr : &fake_stack, next->bottom, next->size);
#elif defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(of_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&left->context, &next->context);
    arrived(fake_stack);
  }

  void arrived([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom = nullptr;
    std::size_t size = 0;
    __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
    if (main_.bottom == nullptr) {  // the first change comes from there
      main_.bottom = bottom;
      main_.size = size;
    }
#endif
  }

  Fiber main_;  // where run() was called
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> ready_;
  Fiber* running_ = nullptr;
  std::size_t ended_ = 0;
  unsigned turns_ = 0;
  std::minstd_rand lots_;
};

}  // namespace pykd::kernels::gpu

#endif  // PYKD_KERNELS_CUDA_FIBERS_H_
