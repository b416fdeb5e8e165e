// Enough of CUDA for the kernels of csrc/cuda to run on the CPU: the threads of a block are fibers that hand over to
// one another at each barrier and shuffle. Blocks run one after the other.
//
// A barrier that not every live thread reaches is an error here, as is a shuffle that a lane of the warp misses; on
// a GPU either might pass unseen.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

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

  // Runs every thread to its next stop, again and again, until all have returned.
  void run() {
    current_block = this;
    for (;;) {
      unsigned live = 0, at_barrier = 0;
      for (unsigned i = 0; i < fibers_.size(); ++i) {
        if (fibers_[i].done) continue;
        running_ = i;
        threadIdx.x = i;
        swapcontext(&scheduler_, &fibers_[i].context);
        if (fibers_[i].done) continue;
        ++live;
        at_barrier += fibers_[i].stop == Stop::barrier;
      }
      if (live == 0) return;
      if (at_barrier != 0 && at_barrier != live)
        throw std::runtime_error("not every thread of a block is at its barrier");
      check_warps();
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
  static constexpr size_t stack_bytes = 64 << 10;

  static void start() {
    BlockOfFibers* block = current_block;
    block->body_();
    block->fibers_[block->running_].done = true;
  }

  void yield(Stop stop) {
    const unsigned self = running_;
    fibers_[self].stop = stop;
    swapcontext(&fibers_[self].context, &scheduler_);
    fibers_[self].stop = Stop::none;
  }

  void check_warps() const {
    for (size_t warp = 0; warp < fibers_.size(); warp += 32) {
      unsigned shuffling = 0, size = 0;
      for (size_t i = warp; i < warp + 32 && i < fibers_.size(); ++i, ++size)
        shuffling += !fibers_[i].done && fibers_[i].stop == Stop::shuffle;
      if (shuffling != 0 && shuffling != size) throw std::runtime_error("not every lane of a warp is at its shuffle");
    }
  }

  std::function<void()> body_;
  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
  unsigned running_ = 0;
};
inline BlockOfFibers* BlockOfFibers::current_block = nullptr;

inline void __syncthreads() { BlockOfFibers::current_block->barrier(); }
inline float __shfl_xor_sync(unsigned, float value, int lane) {
  return BlockOfFibers::current_block->shuffle_xor(value, lane);
}

// Stands in for a kernel launch.
struct HostLaunch {
  unsigned threads;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, const Arguments&... arguments) const {
    blockDim.x = threads;
    gridDim.x = unsigned(blocks);
    for (int64_t block = 0; block < blocks; ++block) {
      blockIdx.x = unsigned(block);
      BlockOfFibers(threads, [&] { kernel(arguments...); }).run();
    }
  }
};
