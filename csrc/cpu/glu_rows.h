// The loops of the glu family: y = act(gate) * value (Y. Dauphin et al., "Language modeling with gated convolutional
// networks", 2017; N. Shazeer, "GLU variants improve transformer", 2020).
//
// Backward, by the product rule, with g = dL/dy: dL/dgate = g * value * act'(gate), dL/dvalue = g * act(gate). S is the
// compute type, T the storage type. Where gate and value are interleaved in memory, g0 v0 g1 v1 ..., two vectors are
// read and deinterleaved.
#pragma once

#include "../glu.h"
#include "activation_rows.h"
#include "target.h"
#include "vec.h"
#include "vec_loops.h"
#include "vec_memory.h"
#include "vec_stream.h"

namespace ckpt::CKPT_ISA {

template <class S>
struct GateAndValue {
  Vec<S> gate, value;
};

template <class S>
CKPT_INLINE GateAndValue<S> deinterleave(Vec<S> low, Vec<S> high) {
  return {shuffle<Evens>(low.v, high.v), shuffle<Odds>(low.v, high.v)};
}

// Of column j on. Where the two are interleaved, `value` is gate + 1, and is not read.
template <bool interleaved, class S, class T>
CKPT_INLINE GateAndValue<S> load_gate_and_value(const T* gate, const T* value, int64_t j, Full<S> all) {
  if (!interleaved) return {load(gate + j, all), load(value + j, all)};
  return deinterleave(load(gate + 2 * j, all), load(gate + 2 * j + Vec<S>::width, all));
}
template <bool interleaved, class S, class T>
CKPT_INLINE GateAndValue<S> load_gate_and_value(const T* gate, const T* value, int64_t j, Partial<S> lanes) {
  if (!interleaved) return {load(gate + j, lanes), load(value + j, lanes)};
  T padded[2 * Vec<S>::width] = {};
  for (int64_t i = 0; i < 2 * lanes.count; ++i) padded[i] = gate[2 * j + i];
  return load_gate_and_value<true, S>(padded, padded + 1, 0, Full<S>{});
}

// Either of the two may be null where they are not interleaved.
template <bool interleaved, class S, class T, class Lanes>
CKPT_INLINE void store_gradients(T* grad_gate, T* grad_value, int64_t j, GateAndValue<S> gradient, Lanes lanes) {
  if (!interleaved) {
    if (grad_gate) store(grad_gate + j, gradient.gate, lanes);
    if (grad_value) store(grad_value + j, gradient.value, lanes);
    return;
  }
  T mixed[2 * Vec<S>::width];
  store(mixed, Vec<S>(shuffle<InterleaveLow>(gradient.gate.v, gradient.value.v)), Full<S>{});
  store(mixed + Vec<S>::width, Vec<S>(shuffle<InterleaveHigh>(gradient.gate.v, gradient.value.v)), Full<S>{});
  __builtin_memcpy(grad_gate + 2 * j, mixed, 2 * lanes.size() * sizeof(T));
}

template <bool interleaved, class S, class T>
void glu_forward_row(const GluForward& a, int64_t row, int64_t begin, int64_t end) {
  const T* gate = a.gate.row<const T>(row) + begin * a.step;
  const T* value = a.value.row<const T>(row) + begin * a.step;
  const Written<T> output(a.output, row, a.rows, a.columns);
  visit_activation(a.activation, [&](auto function) {
    step<S>(end - begin, [&](int64_t j, auto lanes) {
      GateAndValue<S> x = load_gate_and_value<interleaved, S>(gate, value, j, lanes);
      output.put(begin + j, value_of<T>(function, x.gate) * x.value, lanes);
    });
  });
  end_streams();
}

template <bool interleaved, class S, class T>
void glu_backward_row(const GluBackward& a, int64_t row, int64_t begin, int64_t end) {
  const T* gate = a.gate.row<const T>(row) + begin * a.step;
  const T* value = a.value.row<const T>(row) + begin * a.step;
  const T* grad_output = a.grad_output.row<const T>(row) + begin;
  T* grad_gate = a.grad_gate ? a.grad_gate.row<T>(row) + begin * a.step : nullptr;
  T* grad_value = a.grad_value ? a.grad_value.row<T>(row) + begin * a.step : nullptr;
  T* output = a.output ? a.output.row<T>(row) + begin : nullptr;
  visit_activation(a.activation, [&](auto function) {
    step<S>(end - begin, [&](int64_t j, auto lanes) {
      GateAndValue<S> x = load_gate_and_value<interleaved, S>(gate, value, j, lanes);
      Vec<S> g = load(grad_output + j, lanes), factor = value_of<T>(function, x.gate);
      GateAndValue<S> gradient{g * x.value * derivative_of<T>(function, x.gate), g * factor};
      store_gradients<interleaved, S>(grad_gate, grad_value, j, gradient, lanes);
      if (output) store(output + j, factor * x.value, lanes);
    });
  });
}

template <class S, class T>
void glu_forward(const GluForward& a, int64_t row, int64_t begin, int64_t end) {
  a.step == 1 ? glu_forward_row<false, S, T>(a, row, begin, end) : glu_forward_row<true, S, T>(a, row, begin, end);
}
template <class S, class T>
void glu_backward(const GluBackward& a, int64_t row, int64_t begin, int64_t end) {
  a.step == 1 ? glu_backward_row<false, S, T>(a, row, begin, end) : glu_backward_row<true, S, T>(a, row, begin, end);
}

template <class T>
constexpr GluLoops glu_loops_for() {
  using S = typename ComputeType<T>::type;
  return {glu_forward<S, T>, glu_backward<S, T>};
}
CKPT_DEFINE_LOOPS(GluLoops, glu_loops)

}  // namespace ckpt::CKPT_ISA
