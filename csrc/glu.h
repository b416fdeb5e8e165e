// What one glu block computes, as plain pointers: output = activation(gate) * value.
#pragma once

#include "rows.h"

namespace ckpt {

struct Glu {
  int64_t rows = 0, columns = 0;
  int64_t step = 1;  // 2 where gate and value take turns: value is gate one element on, and so are their gradients
  Rows gate, value;
  int activation = 0;
};

struct GluForward : Glu {
  Rows output;
};

struct GluBackward : Glu {
  Rows grad_output;
  Rows grad_gate, grad_value;
  Rows output;  // written again, where whoever read it did not keep it
};

}  // namespace ckpt
