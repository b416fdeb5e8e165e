// The loops of the bias_act family: y = factor * act(z) with z = input + bias and dropout's factor, 0 or 1 / (1 - p).
//
// Backward, by the chain rule: dL/dz = g * factor * act'(z) with g = dL/dy. z is a sum, so that is the gradient of the
// input, and the gradient of the bias is its sum over the rows. The factors are drawn again from the seed (dropout:
// N. Srivastava et al., 2014). S is the compute type, T the storage type.
#pragma once

#include "../bias_act.h"
#include "activation_rows.h"
#include "chunk.h"
#include "dropout_rows.h"
#include "target.h"
#include "vec.h"
#include "vec_loops.h"
#include "vec_memory.h"
#include "vec_stream.h"

namespace ckpt::CKPT_ISA {

// Calls body(column of the row, columns, bias, factors) for the part's columns of a row; bias is null without a bias.
// With dropout the calls are by chunk, because the factors are drawn by chunk; without, factors is null. The part
// begins at a multiple of chunk_columns.
template <class S, class Body>
CKPT_INLINE void for_chunks(const BiasAct& a, int64_t row, const Part& part, Body body) {
  const S* bias = static_cast<const S*>(a.bias);
  if (!a.dropout) return body(part.begin, part.end - part.begin, bias ? bias + part.begin : nullptr, nullptr);
  Chunk<S> factors;
  for (int64_t j0 = part.begin; j0 < part.end; j0 += chunk_columns) {
    const int64_t n = part.end - j0 < chunk_columns ? part.end - j0 : chunk_columns;
    dropout_factors(a.dropout, row, j0, n, factors.value);
    body(j0, n, bias ? bias + j0 : nullptr, factors.value);
  }
}

template <class S, class T>
void bias_act_forward(const BiasActForward& a, const Part& part) {
  visit_activation(a.activation, [&](auto function) {
    for (int64_t row = part.first; row < part.last; ++row) {
      const T* input = a.input.row<const T>(row);
      const Written<T> output(a.output, row, a.rows, a.columns);
      for_chunks<S>(a, row, part, [=](int64_t j0, int64_t n, const S* bias, const S* factor) {
        step<S>(n, [=](int64_t j, auto lanes) {
          Vec<S> z = load(input + j0 + j, lanes);
          if (bias) z += load(bias + j, lanes);
          Vec<S> y = value_of<T>(function, z);
          if (factor) y = y * load(factor + j, lanes);
          output.put(j0 + j, y, lanes);
        });
      });
    }
  });
  end_streams();
}

// `sums` is a row of sums for the gradient of the bias, to which the part's rows are added; null if not needed.
template <class S, class T>
void bias_act_backward(const BiasActBackward& a, const Part& part, void* sums) {
  S* grad_bias = static_cast<S*>(sums);
  visit_activation(a.activation, [&](auto function) {
    for (int64_t row = part.first; row < part.last; ++row) {
      const T* input = a.input.row<const T>(row);
      const T* grad_output = a.grad_output.row<const T>(row);
      const Written<T> grad_input(a.grad_input, row, a.rows, a.columns);
      T* output = a.output ? a.output.row<T>(row) : nullptr;
      for_chunks<S>(a, row, part, [=](int64_t j0, int64_t n, const S* bias, const S* factor) {
        step<S>(n, [=](int64_t j, auto lanes) {
          Vec<S> g = load(grad_output + j0 + j, lanes), z = load(input + j0 + j, lanes);
          if (bias) z += load(bias + j, lanes);
          if (factor) g = g * load(factor + j, lanes);
          g = g * derivative_of<T>(function, z);
          if (output) {
            Vec<S> y = value_of<T>(function, z);
            store(output + j0 + j, factor ? y * load(factor + j, lanes) : y, lanes);
          }
          if (grad_input.row) grad_input.put(j0 + j, g, lanes);
          if (grad_bias) store(grad_bias + j0 + j, load(grad_bias + j0 + j, lanes) + g, lanes);
        });
      });
    }
  });
  end_streams();
}

template <class T>
constexpr BiasActLoops bias_act_loops_for() {
  using S = typename ComputeType<T>::type;
  return {bias_act_forward<S, T>, bias_act_backward<S, T>};
}
CKPT_DEFINE_LOOPS(BiasActLoops, bias_act_loops)

}  // namespace ckpt::CKPT_ISA
