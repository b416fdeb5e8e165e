// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), which generates dropout masks.
//
// The element at (row, column) of a block is kept if lane column % 4 of
// philox(counter = (column / 4, row, row >> 32, 0), key = seed) is at least the threshold p * 2^32.
#pragma once

#include <stdint.h>

#include "macros.h"

namespace ckpt {

CKPT_HD uint64_t wide_product(uint32_t a, uint32_t b) { return uint64_t(a) * b; }
CKPT_HD uint32_t upper_half(uint64_t product) { return uint32_t(product >> 32); }
CKPT_HD uint32_t lower_half(uint64_t product) { return uint32_t(product); }

// U is uint32_t, or a vector of them.
template <class U>
struct PhiloxState {
  U word[4];
};

template <class U>
CKPT_HD PhiloxState<U> philox4x32_10(PhiloxState<U> c, uint64_t seed) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const auto product0 = wide_product(c.word[0], 0xD2511F53u), product1 = wide_product(c.word[2], 0xCD9E8D57u);
    c.word[0] = upper_half(product1) ^ c.word[1] ^ key0;
    c.word[1] = lower_half(product1);
    c.word[2] = upper_half(product0) ^ c.word[3] ^ key1;
    c.word[3] = lower_half(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace ckpt
