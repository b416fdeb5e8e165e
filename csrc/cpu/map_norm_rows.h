// The loops of row norms over the channels of maps whose channels are planes. The statistics of a tile are those of its
// pixels as rows; the output is computed along the planes.
#pragma once

#include "../row_norm.h"
#include "activation_rows.h"
#include "moments_rows.h"
#include "row_norm_operand.h"
#include "target.h"
#include "vec.h"
#include "vec_loops.h"
#include "vec_memory.h"

namespace ckpt::CKPT_ISA {

// Writes mean and rstd of all rows of the block.
template <class S, class T>
void map_statistics(const RowNormForward& a) {
  S *means = static_cast<S*>(a.mean), *rstds = static_cast<S*>(a.rstd);
  for (int64_t begin = 0; begin < a.rows; begin += tile_rows) {
    const int64_t live = a.rows - begin < tile_rows ? a.rows - begin : tile_rows;
    const T* u[tile_rows];
    Statistics<S> statistics[tile_rows];
    for (int64_t i = 0; i < tile_rows; ++i) u[i] = a.input.row<const T>(begin + (i < live ? i : 0));
    statistics_of(u, a.columns, a.centered, S(a.eps), statistics);
    for (int64_t i = 0; i < live; ++i) {
      if (means) means[begin + i] = statistics[i].mean;
      rstds[begin + i] = statistics[i].rstd;
    }
  }
}

// Writes the output of the block's rows, which are pixels. The rows of `input` and `output` are channels.
template <class S, class T>
void map_output(const RowNormForward& a, Rows input, Rows output) {
  const S *means = static_cast<const S*>(a.mean), *rstds = static_cast<const S*>(a.rstd);
  const S *weight = static_cast<const S*>(a.weight), *bias = static_cast<const S*>(a.bias);
  const bool cast = a.cast_before_weight;
  visit_activation(a.activation, [&](auto function) {
    for (int64_t channel = 0; channel < a.columns; ++channel) {
      const T* x = input.row<const T>(channel);
      T* y = output.row<T>(channel);
      const Vec<S> w(weight ? Vec<S>(typename Vec<S>::Type{} + weight[channel]) : Vec<S>(1.0));
      const Vec<S> b(bias ? Vec<S>(typename Vec<S>::Type{} + bias[channel]) : Vec<S>(0.0));
      step<S>(a.rows, [&](int64_t j, auto lanes) CKPT_INLINE_BODY {
        Vec<S> d = load(x + j, lanes);
        if (means) d = d - load(means + j, lanes);
        Vec<S> x_hat = rounded_if<S, T>(cast, d * load(rstds + j, lanes));
        store(y + j, value_of<T>(function, x_hat * w + b), lanes);
      });
    }
  });
}

template <class T>
constexpr MapNormLoops map_norm_loops_for() {
  using S = typename ComputeType<T>::type;
  return {map_statistics<S, T>, map_output<S, T>};
}
CKPT_DEFINE_LOOPS(MapNormLoops, map_norm_loops)

}  // namespace ckpt::CKPT_ISA
