// The operands of a rotary block and of its gradients, as plain pointers: the argument of the CPU's loops
// (cpu/rotary_rows.h) and of the CUDA kernels (cuda/rotary_kernels.cuh).
#pragma once

#include <stdint.h>

#include "rows.h"

namespace ckpt {

// A table of cosines or sines, with a row for each head; a stride is 0 along a broadcast dimension. The entries of pair
// k are k * step and k * step + shift; shift is 0 if both elements of a pair share an entry.
struct Angles {
  Rows rows;
  ScalarKind kind = ScalarKind::float32;
  int64_t step = 1, shift = 0;
};

enum class HeadNorm { none, rms, layer };

// A pair of z = norm(input), (first, second), becomes
//   (first * cos1 - second * sin1, second * cos2 + first * sin2)
// where 1 and 2 are the entries of the pair's two elements. A pair is two adjacent elements if interleaved, otherwise
// element k of the first half and element k of the second half of columns `start` to start + rotary_dim; the other
// columns are copied. The norm is x_hat * weight + bias with x_hat = (input - mean) * rstd over all columns; in an
// RMSNorm the mean is 0.
struct Rotary {
  int64_t rows = 0, columns = 0;
  int64_t middle = 0, inner = 0;  // sizes of the two inner levels of rows
  int64_t rotary_dim = 0, start = 0;
  bool interleaved = false, interleaved_output = false, cast_before_weight = false;
  HeadNorm norm = HeadNorm::none;
  double eps = 0;
  Rows input;  // unset in the backward pass without a norm
  Angles cos, sin;
  const void *weight = nullptr, *bias = nullptr;  // compute type, (columns,)

  CKPT_HD int64_t pairs() const { return rotary_dim / 2; }
  CKPT_HD Place place(int64_t row) const {
    const int64_t above = row / inner;
    return {above / middle, above % middle, row % inner};
  }
};

struct RotaryForward : Rotary {
  Rows output;
};

struct RotaryBackward : Rotary {
  Rows grad_output;
  Rows grad_input;
};

}  // namespace ckpt
