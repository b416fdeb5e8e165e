// The glu kernels for CUDA, and their launches: y = act(u) * w with u = min(gate, limit), w = clamp(value,
// -limit, limit) + offset (Y. Dauphin et al., "Language modeling with gated convolutional networks", 2017; N. Shazeer,
// "GLU variants improve transformer", 2020). elements.cuh describes `launch` and VEC.
//
// Backward, by the product rule, with g = dL/dy: dL/du = g * w * act'(u), dL/dw = g * act(u).
//
// A thread takes VEC columns of a row at a time, in a loop over the whole grid. Where gate and value are interleaved in
// memory (INTERLEAVED), g0 v0 g1 v1 ..., it reads 2 VEC elements and deinterleaves them.
#pragma once

#include "../glu.h"
#include "../math/limits.h"
#include "elements.cuh"

namespace ckpt {

template <class T, int VEC, bool INTERLEAVED>
__device__ __forceinline__ void load_gate_and_value(const Glu& a, int64_t row, int64_t j, float* gate, float* value) {
  if (INTERLEAVED) {
    float low[VEC], high[VEC];
    load<VEC>(a.gate.row<const T>(row) + 2 * j, low);
    load<VEC>(a.gate.row<const T>(row) + 2 * j + VEC, high);
    for (int i = 0; i < VEC; ++i) {
      gate[i] = 2 * i < VEC ? low[2 * i] : high[2 * i - VEC];
      value[i] = 2 * i + 1 < VEC ? low[2 * i + 1] : high[2 * i + 1 - VEC];
    }
  } else {
    load<VEC>(a.gate.row<const T>(row) + j, gate);
    load<VEC>(a.value.row<const T>(row) + j, value);
  }
}

template <class T, int VEC, bool INTERLEAVED>
__device__ __forceinline__ void store_gradients(const GluBackward& a, int64_t row, int64_t j, const float* gate,
                                                const float* value) {
  if (INTERLEAVED) {
    float low[VEC], high[VEC];
    for (int i = 0; i < 2 * VEC; ++i) (i < VEC ? low[i] : high[i - VEC]) = i % 2 ? value[i / 2] : gate[i / 2];
    store<VEC>(a.grad_gate.row<T>(row) + 2 * j, low);
    store<VEC>(a.grad_gate.row<T>(row) + 2 * j + VEC, high);
  } else {
    if (a.grad_gate) store<VEC>(a.grad_gate.row<T>(row) + j, gate);
    if (a.grad_value) store<VEC>(a.grad_value.row<T>(row) + j, value);
  }
}

template <class T, int VEC, bool INTERLEAVED>
__global__ void __launch_bounds__(block_threads) glu_forward_kernel(GluForward a) {
  const int64_t packs = a.columns / VEC;
  const float limit = float(a.limit), offset = float(a.offset);
  for (int64_t k = first_element(); k < a.rows * packs; k += grid_threads()) {
    const int64_t row = k / packs, j = k % packs * VEC;
    float gate[VEC], value[VEC];
    load_gate_and_value<T, VEC, INTERLEAVED>(a, row, j, gate, value);
    for (int i = 0; i < VEC; ++i) gate[i] = limited_above(gate[i], limit);
    activate<VEC>(a.activation, gate);
    for (int i = 0; i < VEC; ++i) value[i] = gate[i] * (limited(value[i], limit) + offset);
    store<VEC>(a.output.row<T>(row) + j, value);
  }
}

template <class T, int VEC, bool INTERLEAVED>
__global__ void __launch_bounds__(block_threads) glu_backward_kernel(GluBackward a) {
  const int64_t packs = a.columns / VEC;
  const float limit = float(a.limit), offset = float(a.offset);
  for (int64_t k = first_element(); k < a.rows * packs; k += grid_threads()) {
    const int64_t row = k / packs, j = k % packs * VEC;
    float gate[VEC], u[VEC], slope[VEC], value[VEC], g[VEC];
    load_gate_and_value<T, VEC, INTERLEAVED>(a, row, j, gate, value);
    load<VEC>(a.grad_output.row<const T>(row) + j, g);
    for (int i = 0; i < VEC; ++i) slope[i] = u[i] = limited_above(gate[i], limit);
    differentiate<VEC>(a.activation, slope);
    activate<VEC>(a.activation, u);
    for (int i = 0; i < VEC; ++i) {
      const float w = limited(value[i], limit) + offset;
      slope[i] = limited_above_gradient(gate[i], limit, g[i] * w * slope[i]);
      gate[i] = limited_gradient(value[i], limit, g[i] * u[i]);
      value[i] = w * u[i];
    }
    store_gradients<T, VEC, INTERLEAVED>(a, row, j, slope, gate);
    if (a.output) store<VEC>(a.output.row<T>(row) + j, value);
  }
}

template <class T, int VEC, class Launch>
void launch_glu(const GluForward& a, const Launch& launch) {
  const int64_t blocks = blocks_for(a.rows * (a.columns / VEC));
  a.step == 1 ? launch(glu_forward_kernel<T, VEC, false>, blocks, a)
              : launch(glu_forward_kernel<T, VEC, true>, blocks, a);
}
template <class T, int VEC, class Launch>
void launch_glu(const GluBackward& a, const Launch& launch) {
  const int64_t blocks = blocks_for(a.rows * (a.columns / VEC));
  a.step == 1 ? launch(glu_backward_kernel<T, VEC, false>, blocks, a)
              : launch(glu_backward_kernel<T, VEC, true>, blocks, a);
}

template <class T>
bool is_vectorizable(const Glu& a) {
  // Interleaved, value begins one element after gate, and is read with gate.
  return a.columns * sizeof(T) % 16 == 0 && is_vectorizable<T>(a.gate) && (a.step == 2 || is_vectorizable<T>(a.value));
}
template <class T>
bool is_wide(const GluForward& a) {
  return is_vectorizable<T>(a) && is_vectorizable<T>(a.output);
}
template <class T>
bool is_wide(const GluBackward& a) {
  return is_vectorizable<T>(a) && is_vectorizable<T>(a.grad_output) && is_vectorizable<T>(a.grad_gate) &&
         is_vectorizable<T>(a.output) && (a.step == 2 || is_vectorizable<T>(a.grad_value));
}

template <class T, class Block, class Launch>
void launch_glu(const Block& a, const Launch& launch) {
  is_wide<T>(a) ? launch_glu<T, 16 / sizeof(T)>(a, launch) : launch_glu<T, 1>(a, launch);
}

}  // namespace ckpt
