// Enough of CUDA for the kernels of csrc/cuda to run on the CPU: the threads of a block are fibers that hand over to
// one another at each barrier and shuffle. A warp runs on to its next barrier before the next warp begins, which is
// when a barrier that is missing shows most. Blocks run one after the other.
//
// A barrier that not every live thread reaches is an error here, as is a shuffle that a lane of the warp misses, and an
// access of several elements that is not aligned; on a GPU some of these might pass unseen.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
// Blocks run one at a time, so that a block's shared variables may be the program's.
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

class BlockOfFibers {
 public:
  BlockOfFibers(unsigned threads, std::function<void()> body) : body_(std::move(body)), fibers_(threads) {
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.stack.reset(new char[stack_bytes]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = stack_bytes;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(&BlockOfFibers::start), 0);
    }
  }

  // Runs every warp to its next barrier, again and again, until all threads have returned.
  void run() {
    current_block = this;
    for (;;) {
      unsigned live = 0, at_barrier = 0;
      for (size_t warp = 0; warp < fibers_.size(); warp += warp_threads) {
        while (run_warp(warp)) {
        }
      }
      for (const Fiber& fiber : fibers_) {
        live += !fiber.done;
        at_barrier += !fiber.done && fiber.stop == Stop::barrier;
      }
      if (live == 0) return;
      if (at_barrier != live) throw std::runtime_error("not every thread of a block is at its barrier");
    }
  }

  void barrier() { yield(Stop::barrier); }

  float shuffle_xor(float value, int lane) {
    const unsigned self = running_;
    fibers_[self].value = value;
    yield(Stop::shuffle);
    const float other = fibers_[self ^ unsigned(lane)].value;
    yield(Stop::shuffle);
    return other;
  }

  static BlockOfFibers* current_block;

 private:
  enum class Stop { none, barrier, shuffle };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    float value = 0;
    bool done = false;
    Stop stop = Stop::none;
  };
  static constexpr size_t stack_bytes = 64 << 10, warp_threads = 32;

  static void start() {
    BlockOfFibers* block = current_block;
    // An exception may not leave a fiber's stack.
    try {
      block->body_();
    } catch (...) {
      block->error_ = std::current_exception();
    }
    block->fibers_[block->running_].done = true;
  }

  void yield(Stop stop) {
    const unsigned self = running_;
    fibers_[self].stop = stop;
    swapcontext(&fibers_[self].context, &scheduler_);
    fibers_[self].stop = Stop::none;
  }

  // Runs each lane of a warp to its next stop; whether that was a shuffle, after which the warp goes on.
  bool run_warp(size_t warp) {
    unsigned shuffling = 0, size = 0;
    for (size_t i = warp; i < warp + warp_threads && i < fibers_.size(); ++i, ++size) {
      if (fibers_[i].done) continue;
      running_ = unsigned(i);
      threadIdx.x = unsigned(i);
      swapcontext(&scheduler_, &fibers_[i].context);
      if (error_) std::rethrow_exception(error_);
      shuffling += !fibers_[i].done && fibers_[i].stop == Stop::shuffle;
    }
    if (shuffling != 0 && shuffling != size) throw std::runtime_error("not every lane of a warp is at its shuffle");
    return shuffling != 0;
  }

  std::function<void()> body_;
  std::vector<Fiber> fibers_;
  std::exception_ptr error_;
  ucontext_t scheduler_;
  unsigned running_ = 0;
};
inline BlockOfFibers* BlockOfFibers::current_block = nullptr;

inline void __syncthreads() { BlockOfFibers::current_block->barrier(); }
inline float __shfl_xor_sync(unsigned, float value, int lane) {
  return BlockOfFibers::current_block->shuffle_xor(value, lane);
}

// Called before each access of several elements at once, which a GPU can only make where they are aligned as their
// type.
template <class Pack, class T>
void check_alignment(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(Pack)) throw std::runtime_error("an access is not aligned");
}
#define CKPT_CHECK_ALIGNMENT(Pack, p) check_alignment<Pack>(p)

// Few enough blocks that threads of the grid take second turns.
#define CKPT_MOST_BLOCKS 2

// Stands in for a kernel launch.
template <class Grid>
struct HostLaunch {
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), Grid grid, const Arguments&... arguments) const {
    blockDim.x = unsigned(grid.threads);
    gridDim.x = unsigned(grid.blocks);
    for (int64_t block = 0; block < grid.blocks; ++block) {
      blockIdx.x = unsigned(block);
      BlockOfFibers(blockDim.x, [&] { kernel(arguments...); }).run();
    }
  }
};
