// The loops of the glu family: y = act(u) * w with u = min(gate, limit), w = clamp(value, -limit, limit) + offset (Y.
// Dauphin et al., "Language modeling with gated convolutional networks", 2017; N. Shazeer, "GLU variants improve
// transformer", 2020).
//
// Backward, by the product rule, with g = dL/dy: dL/du = g * w * act'(u), dL/dw = g * act(u). S is the compute type, T
// the storage type. Gate and value may be interleaved in memory, g0 v0 g1 v1 ...
#pragma once

#include "../glu.h"
#include "../math/limits.h"
#include "activation_rows.h"
#include "target.h"
#include "vec.h"
#include "vec_loops.h"
#include "vec_memory.h"
#include "vec_pairs.h"
#include "vec_stream.h"

namespace ckpt::CKPT_ISA {

template <bool interleaved, class S, class T>
void glu_forward_rows(const GluForward& a, const Part& part) {
  const int64_t begin = part.begin, n = part.end - begin;
  const Vec<S> limit(S(a.limit)), offset(S(a.offset));
  visit_activation(a.activation, [&](auto function) {
    for (int64_t row = part.first; row < part.last; ++row) {
      const T* gate = a.gate.row<const T>(row) + begin * a.step;
      const T* value = a.value.row<const T>(row) + begin * a.step;
      const Written<T> output(a.output, row, a.rows, a.columns);
      step<S>(n, [=](int64_t j, auto lanes) {
        Pairs<S> x = load_pairs<interleaved, S>(gate, value, j, lanes);
        Vec<S> factor = value_of<T>(function, limited_above(x.first, limit));
        output.put(begin + j, factor * (limited(x.second, limit) + offset), lanes);
      });
    }
  });
  end_streams();
}

template <bool interleaved, class S, class T>
void glu_backward_rows(const GluBackward& a, const Part& part) {
  const int64_t begin = part.begin, n = part.end - begin;
  const Vec<S> limit(S(a.limit)), offset(S(a.offset));
  visit_activation(a.activation, [&](auto function) {
    for (int64_t row = part.first; row < part.last; ++row) {
      const T* gate = a.gate.row<const T>(row) + begin * a.step;
      const T* value = a.value.row<const T>(row) + begin * a.step;
      const T* grad_output = a.grad_output.row<const T>(row) + begin;
      T* grad_gate = a.grad_gate ? a.grad_gate.row<T>(row) + begin * a.step : nullptr;
      T* grad_value = a.grad_value ? a.grad_value.row<T>(row) + begin * a.step : nullptr;
      T* output = a.output ? a.output.row<T>(row) + begin : nullptr;
      step<S>(n, [=](int64_t j, auto lanes) {
        Pairs<S> x = load_pairs<interleaved, S>(gate, value, j, lanes);
        Vec<S> u = limited_above(x.first, limit), w = limited(x.second, limit) + offset;
        Vec<S> g = load(grad_output + j, lanes), factor = value_of<T>(function, u);
        Pairs<S> gradient{limited_above_gradient(x.first, limit, g * w * derivative_of<T>(function, u)),
                          limited_gradient(x.second, limit, g * factor)};
        store_pairs<interleaved, S>(grad_gate, grad_value, j, gradient, lanes);
        if (output) store(output + j, factor * w, lanes);
      });
    }
  });
}

template <class S, class T>
void glu_forward(const GluForward& a, const Part& part) {
  a.step == 1 ? glu_forward_rows<false, S, T>(a, part) : glu_forward_rows<true, S, T>(a, part);
}
template <class S, class T>
void glu_backward(const GluBackward& a, const Part& part) {
  a.step == 1 ? glu_backward_rows<false, S, T>(a, part) : glu_backward_rows<true, S, T>(a, part);
}

template <class T>
constexpr GluLoops glu_loops_for() {
  using S = typename ComputeType<T>::type;
  return {glu_forward<S, T>, glu_backward<S, T>};
}
CKPT_DEFINE_LOOPS(GluLoops, glu_loops)

}  // namespace ckpt::CKPT_ISA
