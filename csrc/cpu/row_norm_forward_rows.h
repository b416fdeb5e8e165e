// The forward loops of the row-norm family (csrc/row_norm.h): LayerNorm (J. Ba et al., "Layer normalization", 2016),
// RMSNorm (B. Zhang and R. Sennrich, "Root mean square layer normalization", 2019), each with a prologue and an
// epilogue.
//
// S is the compute type, T the storage type, and U the type of u in memory: T if u is the input, S if u is staged in
// scratch.
#pragma once

#include "../row_norm.h"
#include "activation_rows.h"
#include "chunk.h"
#include "moments_rows.h"
#include "row_norm_operand.h"
#include "target.h"
#include "vec.h"
#include "vec_loops.h"
#include "vec_memory.h"
#include "vec_stream.h"

namespace ckpt::CKPT_ISA {

// An epilogue is the computation after z = x_hat * weight + bias; this one returns y = z of one vector of a row.
struct ForwardAsIs {
  template <class V, class Lanes>
  CKPT_INLINE V output(V z, int64_t, Lanes) const {
    return z;
  }
};
template <class T, class Function>
struct ForwardActivation {
  template <class V, class Lanes>
  CKPT_INLINE V output(V z, int64_t, Lanes) const {
    return value_of<T>(Function{}, z);
  }
};
template <class T, class Function>
struct ForwardGate {
  const T* gate;
  template <class V, class Lanes>
  CKPT_INLINE V output(V z, int64_t column, Lanes lanes) const {
    return z * value_of<T>(Function{}, V(load(gate + column, lanes)));
  }
};

// Writes y of one row, from u and the statistics, and prefetches the input of the row `ahead`.
template <class S, class T, class U, class Epilogue>
void write_row(const RowNormForward& a, int64_t row, int64_t ahead, const U* u, Statistics<S> statistics,
               Epilogue epilogue) {
  const Coefficients<S> weight(a.weight, row, a, constants<S>.ones.value),
      bias(a.bias, row, a, constants<S>.zeros.value);
  const Written<T> output(a.output, row, a.rows, a.columns);
  const bool cast = a.cast_before_weight;
  const Vec<S> mean(statistics.mean), rstd(statistics.rstd);
  const T* next = a.input.row<const T>(ahead < a.rows ? ahead : row);
  for (int64_t j0 = 0; j0 < a.columns; j0 += chunk_columns) {
    const int64_t n = a.columns - j0 < chunk_columns ? a.columns - j0 : chunk_columns;
    const S *w = weight.at(j0), *b = bias.at(j0);
    sweep<S>(n, [=](int64_t j, auto lanes, auto slot) {
      prefetch_lines(next + j0 + j, slot);
      Vec<S> x_hat = rounded_if<S, T>(cast, (load(u + j0 + j, lanes) - mean) * rstd);
      Vec<S> z = x_hat * load(w + j, lanes) + load(b + j, lanes);
      output.put(j0 + j, epilogue.output(z, j0 + j, lanes), lanes);
    });
  }
}

template <class S, class T, class U>
CKPT_INLINE void finish_row(const RowNormForward& a, int64_t row, int64_t ahead, const U* u, Statistics<S> statistics) {
  if (!has_epilogue(a)) return write_row<S, T>(a, row, ahead, u, statistics, ForwardAsIs{});
  visit_activation(a.activation, [&](auto function) {
    using Function = decltype(function);
    if (a.gate)
      write_row<S, T>(a, row, ahead, u, statistics, ForwardGate<T, Function>{a.gate.row<const T>(row)});
    else
      write_row<S, T>(a, row, ahead, u, statistics, ForwardActivation<T, Function>{});
  });
}

// All rows from begin to end, `count` at a time. source(row, i) returns u of a row, which is the i-th of the tile. The
// first row of the last tile stands in for missing rows.
template <int count, class S, class T, class U, class Source>
CKPT_INLINE void forward_tiles(const RowNormForward& a, int64_t begin, int64_t end, Source source) {
  S *means = static_cast<S*>(a.mean), *rstds = static_cast<S*>(a.rstd);
  for (int64_t first = begin; first < end; first += count) {
    const int64_t live = end - first < count ? end - first : count;
    const U* u[count];
    Statistics<S> statistics[count];
    for (int64_t i = 0; i < count; ++i) u[i] = i < live ? source(first + i, i) : u[0];
    if (a.given_statistics) {
      for (int64_t i = 0; i < live; ++i) statistics[i] = {means ? means[first + i] : S(0), rstds[first + i]};
    } else {
      statistics_of(u, a.columns, a.centered, S(a.eps), statistics);
      for (int64_t i = 0; i < live; ++i) {
        if (means) means[first + i] = statistics[i].mean;
        rstds[first + i] = statistics[i].rstd;
      }
    }
    for (int64_t i = 0; i < live; ++i) finish_row<S, T>(a, first + i, first + i + count, u[i], statistics[i]);
  }
}

template <int count, class S, class T>
void forward_rows_by(const RowNormForward& a, int64_t begin, int64_t end, S* scratch) {
  const int64_t width = whole_vectors<S>(a.columns);
  if (has_prologue(a))
    forward_tiles<count, S, T, S>(a, begin, end, [=, &a](int64_t row, int64_t i) {
      stage_row<S, T>(a, a.residual_out, row, scratch + i * width);
      return scratch + i * width;
    });
  else
    forward_tiles<count, S, T, T>(a, begin, end, [&](int64_t row, int64_t) { return a.input.row<const T>(row); });
}

template <class S, class T>
void forward_rows(const RowNormForward& a, int64_t begin, int64_t end, void* scratch) {
  if (a.columns <= tile_columns)
    forward_rows_by<tile_rows, S, T>(a, begin, end, static_cast<S*>(scratch));
  else
    forward_rows_by<1, S, T>(a, begin, end, static_cast<S*>(scratch));
  end_streams();
}

// The size of the scratch, in elements of S.
template <class S>
int64_t forward_scratch(const RowNormForward& a) {
  return has_prologue(a) ? (a.columns <= tile_columns ? tile_rows : 1) * whole_vectors<S>(a.columns) : 0;
}

}  // namespace ckpt::CKPT_ISA
