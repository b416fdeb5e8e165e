// The operands of a row-norm block and of its gradients, as plain pointers: the argument of the CPU's loops
// (cpu/row_norm_rows.h) and of the CUDA kernels (cuda/row_norm_kernels.cuh).
#pragma once

#include <stdint.h>

#include "math/dropout.h"
#include "rows.h"

namespace ckpt {

// y = activation(z) with z = x_hat * weight + bias and x_hat = (u - mean) * rstd, where u is one of
//   input,  pre_activation(input),  residual + dropout(input),  input * activation(gate) with gate_before_norm;
// with a gate and without gate_before_norm, y = z * activation(gate). LayerNorm is centered; in an RMSNorm the mean is
// 0.
struct RowNorm {
  int64_t rows = 0, columns = 0;
  int64_t rows_per_group = 1;                     // rows that share one row of weight and bias
  Rows input, residual, gate;                     // storage type
  const void *weight = nullptr, *bias = nullptr;  // compute type, (groups, columns)
  void *mean = nullptr, *rstd = nullptr;          // compute type, (rows,); mean is null if not centered
  double eps = 0;
  bool centered = true, cast_before_weight = false, gate_before_norm = false;
  int pre_activation = 0, activation = 0;
  Dropout dropout;
};

struct RowNormForward : RowNorm {
  Rows output, residual_out;
  bool given_statistics = false;  // whether mean and rstd are inputs
};

struct RowNormBackward : RowNorm {
  Rows grad_output, grad_residual_out;
  Rows grad_input, grad_residual, grad_gate;
  Rows output;  // optional: the output, computed again for a consumer that discarded its input; never with a gate
};

}  // namespace ckpt
