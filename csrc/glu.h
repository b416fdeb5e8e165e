// The operands of a glu block as plain pointers: output = activation(min(gate, limit)) * (clamp(value, -limit, limit) +
// offset). Without a limit, `limit` is infinite.
#pragma once

#include <math.h>

#include "rows.h"

namespace ckpt {

struct Glu {
  int64_t rows = 0, columns = 0;
  int64_t step = 1;  // 2 where gate and value are interleaved: value begins one element after gate, as do the gradients
  Rows gate, value;
  int activation = 0;
  double limit = INFINITY, offset = 0;
};

struct GluForward : Glu {
  Rows output;
};

struct GluBackward : Glu {
  Rows grad_output;
  Rows grad_gate, grad_value;
  Rows output;  // written again if it is given: a layer after the block needs it and has not kept it
};

}  // namespace ckpt
