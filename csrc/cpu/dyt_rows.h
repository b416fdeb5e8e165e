// The loops of the DyT family: y = t * w + b with t = tanh(alpha * x) (J. Zhu et al., "Transformers without
// normalization", 2025).
//
// Backward, by the chain rule, with g = dL/dy and s = g * w * (1 - t^2), the gradient of alpha * x: dL/dx = alpha * s,
// dL/dalpha is the sum of s * x over all elements, and dL/dw and dL/db are the sums of g * t and of g over the rows. S
// is the compute type, T the storage type.
#pragma once

#include "../dyt.h"
#include "activation_rows.h"
#include "chunk.h"
#include "target.h"
#include "vec.h"
#include "vec_loops.h"
#include "vec_memory.h"
#include "vec_stream.h"

namespace ckpt::CKPT_ISA {

// alpha in every lane.
template <class S>
CKPT_INLINE Vec<S> alpha_of(const Dyt& a) {
  return Vec<S>(double(*static_cast<const S*>(a.alpha)));
}

template <class S, class T>
void dyt_forward(const DytForward& a, const Part& part) {
  const S *weight = static_cast<const S*>(a.weight), *bias = static_cast<const S*>(a.bias);
  const Vec<S> alpha = alpha_of<S>(a);
  const int64_t begin = part.begin, n = part.end - begin;
  for (int64_t row = part.first; row < part.last; ++row) {
    const T* input = a.input.row<const T>(row);
    const Written<T> output(a.output, row, a.rows, a.columns);
    step<S>(n, [=](int64_t offset, auto lanes) {
      const int64_t j = begin + offset;
      Vec<S> y = value_of<T>(Tanh{}, alpha * load(input + j, lanes));
      if (weight) y = y * load(weight + j, lanes);
      if (bias) y = y + load(bias + j, lanes);
      output.put(j, y, lanes);
    });
  }
  end_streams();
}

// `weight_sums` and `bias_sums` are rows of sums for the gradients of weight and bias, to which the part's rows are
// added, and *alpha_sum is one number; each is null if not needed. The sums of chunks are added up in float64, so that
// the error does not grow with the number of elements.
template <class S, class T>
void dyt_backward(const DytBackward& a, const Part& part, double* alpha_sum, void* weight_sums, void* bias_sums) {
  const S* weight = static_cast<const S*>(a.weight);
  S *grad_weight = static_cast<S*>(weight_sums), *grad_bias = static_cast<S*>(bias_sums);
  const Vec<S> alpha = alpha_of<S>(a);
  for (int64_t row = part.first; row < part.last; ++row) {
    const T* input = a.input.row<const T>(row);
    const T* grad_output = a.grad_output.row<const T>(row);
    const Written<T> grad_input(a.grad_input, row, a.rows, a.columns);
    for (int64_t j0 = part.begin; j0 < part.end; j0 += chunk_columns) {
      const int64_t n = part.end - j0 < chunk_columns ? part.end - j0 : chunk_columns;
      Accumulator<S> sum;
      sweep<S>(n, [=, &sum](int64_t offset, auto lanes, auto slot) {
        const int64_t j = j0 + offset;
        Vec<S> x = load(input + j, lanes), g = load(grad_output + j, lanes);
        Vec<S> t = value_of<T>(Tanh{}, alpha * x);
        if (grad_weight) store(grad_weight + j, load(grad_weight + j, lanes) + g * t, lanes);
        if (grad_bias) store(grad_bias + j, load(grad_bias + j, lanes) + g, lanes);
        if (weight) g = g * load(weight + j, lanes);
        Vec<S> s = g * (Vec<S>(1.0) - t * t);
        if (grad_input.row) grad_input.put(j, alpha * s, lanes);
        sum.part[slot.index] += s * x;
      });
      if (alpha_sum) *alpha_sum += double(sum.total());
    }
  }
  end_streams();
}

template <class T>
constexpr DytLoops dyt_loops_for() {
  using S = typename ComputeType<T>::type;
  return {dyt_forward<S, T>, dyt_backward<S, T>};
}
CKPT_DEFINE_LOOPS(DytLoops, dyt_loops)

}  // namespace ckpt::CKPT_ISA
