// What one bias_act block computes, as plain pointers: output = dropout(activation(input + bias)).
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
  Rows output;  // written again if it is given: a layer after the block needs it and has not kept it
};

}  // namespace ckpt
