// What one row-norm block computes, and its gradients, as plain pointers: what the ops hand to the CPU's row loops
// (cpu/row_norm_rows.h) and to the CUDA kernels (cuda/row_norm_kernels.cuh).
#pragma once

#include <stdint.h>

#include "math/dropout.h"
#include "rows.h"

namespace ckpt {

// y = activation(x_hat * weight + bias), x_hat = (u - mean) * rstd, where u is one of
//   input,  pre_activation(input),  residual + dropout(input),  input * activation(gate) (gate_first),
// and y is x_hat * weight * activation(gate) where there is a gate and it does not come first.
struct RowNorm {
  int64_t rows = 0, columns = 0;
  int64_t rows_per_group = 1;                     // rows that share one row of weight and bias
  Rows input, residual, gate;                     // storage type
  const void *weight = nullptr, *bias = nullptr;  // compute type, (groups, columns)
  void *mean = nullptr, *rstd = nullptr;          // compute type, (rows,); mean is null if not centered
  double eps = 0;
  bool centered = true, cast_before_weight = false, gate_first = false;
  int pre_activation = 0, activation = 0;
  Dropout dropout;
};

struct RowNormForward : RowNorm {
  Rows output, residual_out;
  bool given_statistics = false;  // mean and rstd are read, not found
};

struct RowNormBackward : RowNorm {
  Rows grad_output, grad_residual_out;
  Rows grad_input, grad_residual, grad_gate;
  Rows output;  // written again, where whoever read it did not keep it; not where there is a gate
};

}  // namespace ckpt
