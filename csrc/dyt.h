// The operands of a DyT block, output = tanh(alpha * input) * weight + bias, as plain pointers.
#pragma once

#include "rows.h"

namespace ckpt {

struct Dyt {
  int64_t rows = 0, columns = 0;
  Rows input;
  const void* alpha = nullptr;                    // compute type, one number
  const void *weight = nullptr, *bias = nullptr;  // compute type, (columns,)
};

struct DytForward : Dyt {
  Rows output;
};

struct DytBackward : Dyt {
  Rows grad_output;
  Rows grad_input;
};

}  // namespace ckpt
