// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the dropout mask.
//
// The element at (row, column) of a block is kept if lane column % 4 of
// philox(counter = (column / 4, row, row >> 32, 0), key = seed) is at least the threshold p * 2^32.
#pragma once

#include <stdint.h>

#include "macros.h"

namespace ckpt {

CKPT_HD uint32_t multiply_high(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }

// U is uint32_t, or a vector of them.
template <class U>
struct PhiloxState {
  U word[4];
};

template <class U>
CKPT_HD PhiloxState<U> philox4x32_10(PhiloxState<U> c, uint64_t seed) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    U high0 = multiply_high(c.word[0], 0xD2511F53u), low0 = c.word[0] * 0xD2511F53u;
    U high1 = multiply_high(c.word[2], 0xCD9E8D57u), low1 = c.word[2] * 0xCD9E8D57u;
    c.word[0] = high1 ^ c.word[1] ^ key0;
    c.word[1] = low1;
    c.word[2] = high0 ^ c.word[3] ^ key1;
    c.word[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace ckpt
