// The operands of a bias_act block, output = dropout(activation(input + bias)), as plain pointers.
#pragma once

#include "math/dropout.h"
#include "rows.h"

namespace ckpt {

struct BiasAct {
  int64_t rows = 0, columns = 0;
  Rows input;
  const void* bias = nullptr;  // compute type, (columns,)
  int activation = 0;
  Dropout dropout;
};

struct BiasActForward : BiasAct {
  Rows output;
};

struct BiasActBackward : BiasAct {
  Rows grad_output;
  Rows grad_input;
  Rows output;  // optional: the output, computed again for a consumer that discarded its input
};

}  // namespace ckpt
