// The 16-bit storage types, as bits.
#pragma once

#include <stdint.h>

namespace ckpt {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type that a storage type is computed in.
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

}  // namespace ckpt
