// The parameters of a dropout in a kernel: the threshold of the 32-bit draws (philox.h) that keep an element, and the
// factor of kept elements.
#pragma once

#include <stdint.h>

#include "macros.h"

namespace ckpt {

// The factors of dropout with probability p: 0 for a dropped element, `scale` for a kept element. Converts to false
// without dropout.
struct Dropout {
  const int64_t* seed = nullptr;
  uint64_t threshold = 0;  // p * 2^32; 0 keeps all, 2^32 drops all
  double scale = 1;        // 1 / (1 - p); 0 for p = 1

  CKPT_HD static Dropout make(double p, const int64_t* seed) {
    return {seed, uint64_t(p * 4294967296.0), p < 1 ? 1 / (1 - p) : 0.0};
  }
  CKPT_HD explicit operator bool() const { return seed; }
  template <class T>
  CKPT_HD T factor(uint32_t bits) const {
    return bits >= threshold ? T(scale) : T(0);
  }
};

}  // namespace ckpt
