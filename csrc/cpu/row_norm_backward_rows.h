// The backward loops of the row-norm family (csrc/row_norm.h; papers in row_norm_forward_rows.h).
//
// With z = x_hat * weight + bias, g = dL/dz, h = g * weight = dL/dx_hat and N columns: x_hat_i = (u_i - mean) * rstd,
// and mean and rstd depend on every u_j, so dx_hat_i/du_j = rstd * ((i == j) - 1 / N - x_hat_i * x_hat_j / N), and so
//   dL/du = rstd * (h - x_hat * c1 - c2) with c1 = mean(h * x_hat) and c2 = mean(h),
//   dL/dweight = sum(g * x_hat) and dL/dbias = sum(g) over the rows.
// In an RMSNorm the mean does not depend on u, and c2 is 0. With cast_before_weight, z and dL/dweight use the rounded
// x_hat, and the derivative of rounding is taken as 1.
//
// A tile of tile_rows rows takes two passes. The first computes the sums for c1, c2 and the gradients of weight and
// bias; the second writes the gradients of the operands of u. S is the compute type, T the storage type, U the type of
// u in memory (T or S).
#pragma once

#include "../row_norm.h"
#include "activation_rows.h"
#include "chunk.h"
#include "dropout_rows.h"
#include "row_norm_operand.h"
#include "target.h"
#include "vec.h"
#include "vec_loops.h"
#include "vec_memory.h"
#include "vec_stream.h"

namespace ckpt::CKPT_ISA {

// One row of a tile.
template <class S, class T, class U>
struct BackwardRow {
  int64_t index;
  int64_t ahead;  // the corresponding row of the next tile, which is prefetched
  const U* u;
  const T *grad_output, *gate;
  T *grad_gate, *output;
  S mean, rstd;
  S* grad_x_hat;              // scratch for h, with an epilogue
  double sum_h, sum_h_x_hat;  // in float64, so that the error does not grow with the number of chunks

  CKPT_INLINE BackwardRow() {}
  template <class Lanes>
  CKPT_INLINE Vec<S> x_hat(int64_t column, Lanes lanes) const {
    return (load(u + column, lanes) - Vec<S>(mean)) * Vec<S>(rstd);
  }
};

// An epilogue is the computation after z = x_hat * weight + bias. Its gradient is g = dL/dz of one vector of a row,
// from grad = dL/dy. With an epilogue h is stored, because the second computation would take longer than a read.
struct NoEpilogue {
  static constexpr bool stores_h = false;
  template <class Row, class V, class Lanes>
  CKPT_INLINE V grad_z(const Row&, int64_t, Lanes, V grad, V, V, V) const {
    return grad;
  }
  template <class V>
  CKPT_INLINE V output(V z) const {
    return z;
  }
};
template <class T, class Function>
struct ActivationEpilogue {
  static constexpr bool stores_h = true;
  template <class Row, class V, class Lanes>
  CKPT_INLINE V grad_z(const Row&, int64_t, Lanes, V grad, V x_hat, V weight, V bias) const {
    return grad * derivative_of<T>(Function{}, x_hat * weight + bias);
  }
  template <class V>
  CKPT_INLINE V output(V z) const {
    return value_of<T>(Function{}, z);
  }
};
// y = z * act(gate). Stores the gate's gradient too: dL/dgate = dL/dy * z * act'(gate).
template <class T, class Function>
struct GateEpilogue {
  static constexpr bool stores_h = true;
  template <class Row, class V, class Lanes>
  CKPT_INLINE V grad_z(const Row& row, int64_t column, Lanes lanes, V grad, V x_hat, V weight, V) const {
    V gate = load(row.gate + column, lanes);
    if (row.grad_gate)
      store(row.grad_gate + column, grad * (x_hat * weight) * derivative_of<T>(Function{}, gate), lanes);
    return grad * value_of<T>(Function{}, gate);
  }
  template <class V>
  CKPT_INLINE V output(V z) const {
    return z;
  }
};

// The first pass over one chunk of a tile's columns: adds to the sums of h and h * x_hat of each row, and to the sums
// for the gradients of weight and bias. Writes the output again if the block requests the output.
template <class Epilogue, class S, class T, class U>
CKPT_INLINE void reduce_chunk(const RowNormBackward& a, BackwardRow<S, T, U>* rows, int64_t j0, int64_t n, const S* w,
                              const S* b, S* grad_weight, S* grad_bias, Epilogue epilogue) {
  const bool cast = a.cast_before_weight;
  // Copies, because the compiler reads memory again after each store.
  BackwardRow<S, T, U> row[tile_rows];
  const T* written[tile_rows];
  Vec<S> sum_h[tile_rows], sum_h_x_hat[tile_rows];  // of this chunk, one sum a lane
  for (int i = 0; i < tile_rows; ++i) {
    row[i] = rows[i];
    sum_h[i] = sum_h_x_hat[i] = Vec<S>(S(0));
    // Narrow tiles stay in the first-level cache, where the second pass then finds the lines to write.
    const bool is_narrow = a.grad_input && a.columns <= tile_columns;
    written[i] = is_narrow ? a.grad_input.row<const T>(rows[i].index) + j0 : nullptr;
  }
  step<S>(n, [&](int64_t j, auto lanes) {
    Vec<S> weight = load(w + j, lanes), bias = load(b + j, lanes);
    Vec<S> gw = load(grad_weight + j, lanes), gb = load(grad_bias + j, lanes);
    for (int i = 0; i < tile_rows; ++i) {
      if (written[i]) prefetch_for_write(written[i] + j);
      Vec<S> x_hat = row[i].x_hat(j0 + j, lanes), rounded = rounded_if<S, T>(cast, x_hat);
      Vec<S> grad = load(row[i].grad_output + j0 + j, lanes);
      Vec<S> g = epilogue.grad_z(row[i], j0 + j, lanes, grad, rounded, weight, bias);
      if (row[i].output) store(row[i].output + j0 + j, epilogue.output(rounded * weight + bias), lanes);
      gw += g * rounded;
      gb += g;
      Vec<S> h = g * weight;
      sum_h[i] += h;
      sum_h_x_hat[i] += h * x_hat;
      if (Epilogue::stores_h) store(row[i].grad_x_hat + j0 + j, h, Full<S>{});
    }
    store(grad_weight + j, gw, lanes);
    store(grad_bias + j, gb, lanes);
  });
  for (int i = 0; i < tile_rows; ++i) {
    rows[i].sum_h += double(sum_lanes(sum_h[i]));
    rows[i].sum_h_x_hat += double(sum_lanes(sum_h_x_hat[i]));
  }
}

// The second pass, over one row: computes the gradient of u, and from this the gradients of the operands of u.
template <class S, class T, class U>
void distribute_row(const RowNormBackward& a, const BackwardRow<S, T, U>& r) {
  const int64_t row = r.index;
  Coefficients<S> weight(a.weight, row, a, constants<S>.ones.value);
  const bool h_is_stored = has_epilogue(a);
  const S c2 = a.centered ? S(r.sum_h / double(a.columns)) : S(0);
  const S c1 = S(r.sum_h_x_hat / double(a.columns));
  // dL/du = rstd * (h - x_hat * c1 - c2) = (u - mean) * by_deviation + (h * rstd + constant).
  const Vec<S> mean(r.mean), rstd(r.rstd), by_deviation(-r.rstd * r.rstd * c1), constant(-r.rstd * c2);
  const U* u = r.u;
  const S* grad_x_hat = r.grad_x_hat;
  // Prefetched here, row by row, because the processor's own prefetching follows one row better than a tile of rows.
  const T *next_u = a.input.row<const T>(r.ahead), *next_g = a.grad_output.row<const T>(r.ahead);
  const T* grad_output = r.grad_output;
  Written<T> grad_input(a.grad_input, row, a.rows, a.columns);
  // The residual's gradient is computed from grad_input, which therefore should stay in the cache.
  if (a.grad_residual) grad_input.streams = false;
  Chunk<S> slope, gate;
  for (int64_t j0 = 0; j0 < a.columns; j0 += chunk_columns) {
    int64_t n = a.columns - j0 < chunk_columns ? a.columns - j0 : chunk_columns;
    const S* w = weight.at(j0);
    auto grad_u = [&](int64_t j, auto lanes, auto slot) CKPT_INLINE_BODY {
      prefetch_lines(next_u + j0 + j, slot);
      prefetch_lines(next_g + j0 + j, slot);
      Vec<S> h =
          h_is_stored ? load(grad_x_hat + j0 + j, lanes) : load(grad_output + j0 + j, lanes) * load(w + j, lanes);
      return (load(u + j0 + j, lanes) - mean) * by_deviation + (h * rstd + constant);
    };
    if (a.pre_activation) {
      copy_to_chunk(a.input.row<const T>(row) + j0, n, slope.value);
      differentiate<T>(a.pre_activation, slope.value, n);
      sweep<S>(n, [&](int64_t j, auto lanes, auto slot) CKPT_INLINE_BODY {
        grad_input.put(j0 + j, grad_u(j, lanes, slot) * load(slope.value + j, lanes), lanes);
      });
    } else if (a.gate_before_norm) {
      const T* input = a.input.row<const T>(row) + j0;
      T* grad_gate = a.grad_gate.row<T>(row) + j0;
      copy_to_chunk(a.gate.row<const T>(row) + j0, n, gate.value);
      copy_to_chunk(gate.value, n, slope.value);
      activate<T>(a.activation, gate.value, n);
      differentiate<T>(a.activation, slope.value, n);
      sweep<S>(n, [&](int64_t j, auto lanes, auto slot) CKPT_INLINE_BODY {
        Vec<S> g = grad_u(j, lanes, slot);
        grad_input.put(j0 + j, g * load(gate.value + j, lanes), lanes);
        store(grad_gate + j, g * load(input + j, lanes) * load(slope.value + j, lanes), lanes);
      });
    } else if (a.grad_residual_out) {
      const T* above = a.grad_residual_out.row<const T>(row) + j0;
      sweep<S>(n, [&](int64_t j, auto lanes, auto slot) CKPT_INLINE_BODY {
        grad_input.put(j0 + j, grad_u(j, lanes, slot) + load(above + j, lanes), lanes);
      });
    } else {
      sweep<S>(n, [&](int64_t j, auto lanes, auto slot)
                      CKPT_INLINE_BODY { grad_input.put(j0 + j, grad_u(j, lanes, slot), lanes); });
    }
    if (a.grad_residual) {
      // So far grad_input holds the gradient of the sum residual + dropout(input). The residual's gradient is the same,
      // the input's is multiplied by dropout's factors.
      T* grad_residual = a.grad_residual.row<T>(row) + j0;
      dropout_factors(a.dropout, row, j0, n, slope.value);
      sweep<S>(n, [&](int64_t j, auto lanes, auto) CKPT_INLINE_BODY {
        Vec<S> g = load(grad_input.row + j0 + j, lanes);
        store(grad_residual + j, g, lanes);
        store(grad_input.row + j0 + j, g * load(slope.value + j, lanes), lanes);
      });
    }
  }
}

// Both passes over a tile. The first `live` rows are rows of the matrix; the others are zeros, which do not change any
// sum.
template <class S, class T, class U>
void backward_tile(const RowNormBackward& a, BackwardRow<S, T, U>* rows, int64_t live, S* grad_weight, S* grad_bias) {
  Chunk<S> unused;  // receives the sums for a gradient that is not needed
  Coefficients<S> weight(a.weight, rows[0].index, a, constants<S>.ones.value);
  Coefficients<S> bias(a.bias, rows[0].index, a, constants<S>.zeros.value);
  for (int64_t j0 = 0; j0 < a.columns; j0 += chunk_columns) {
    int64_t n = a.columns - j0 < chunk_columns ? a.columns - j0 : chunk_columns;
    auto reduce = [&](auto epilogue) {
      reduce_chunk(a, rows, j0, n, weight.at(j0), bias.at(j0), grad_weight ? grad_weight + j0 : unused.value,
                   grad_bias ? grad_bias + j0 : unused.value, epilogue);
    };
    if (!has_epilogue(a))
      reduce(NoEpilogue{});
    else if (a.gate)
      visit_activation(a.activation, [&](auto function) { reduce(GateEpilogue<T, decltype(function)>{}); });
    else
      visit_activation(a.activation, [&](auto function) { reduce(ActivationEpilogue<T, decltype(function)>{}); });
  }
  if (a.grad_input)
    for (int64_t i = 0; i < live; ++i) distribute_row<S, T, U>(a, rows[i]);
}

// All tiles of the rows from begin to end. source(row, i) returns u of a row, which is the i-th of the tile. `zeros`
// and `sink` are rows of scratch that stand in for missing rows of the last tile, for reads and for writes.
template <class S, class T, class U, class Source>
CKPT_INLINE void backward_tiles(const RowNormBackward& a, int64_t begin, int64_t end, S* grad_x_hat, S* zeros, S* sink,
                                S* grad_weight, S* grad_bias, Source source) {
  const int64_t width = whole_vectors<S>(a.columns);
  BackwardRow<S, T, U> rows[tile_rows];
  if ((end - begin) % tile_rows) __builtin_memset(zeros, 0, width * sizeof(S));
  for (int64_t first = begin; first < end; first += tile_rows) {
    const int64_t live = end - first < tile_rows ? end - first : tile_rows;
    for (int64_t i = 0; i < tile_rows; ++i) {
      const int64_t row = first + (i < live ? i : 0), ahead = row + tile_rows;
      BackwardRow<S, T, U>& r = rows[i];
      r.index = row;
      r.ahead = ahead < a.rows ? ahead : row;
      r.grad_x_hat = grad_x_hat + i * width;
      r.sum_h = r.sum_h_x_hat = 0;
      if (i < live) {
        r.u = source(row, i);
        r.grad_output = a.grad_output.row<const T>(row);
        r.gate = gate_last(a) ? a.gate.row<const T>(row) : nullptr;
        r.grad_gate = a.grad_gate ? a.grad_gate.row<T>(row) : nullptr;
        r.output = a.output ? a.output.row<T>(row) : nullptr;
        r.mean = a.mean ? static_cast<const S*>(a.mean)[row] : S(0);
        r.rstd = static_cast<const S*>(a.rstd)[row];
      } else {
        r.u = reinterpret_cast<const U*>(zeros);
        r.grad_output = r.gate = reinterpret_cast<const T*>(zeros);
        r.grad_gate = a.grad_gate ? reinterpret_cast<T*>(sink) : nullptr;
        r.output = nullptr;
        r.mean = r.rstd = S(0);
      }
    }
    backward_tile(a, rows, live, grad_weight, grad_bias);
  }
  end_streams();
}

// All rows from begin to end belong to one group and share weight and bias.
template <class S, class T>
void backward_rows(const RowNormBackward& a, int64_t begin, int64_t end, void* scratch, void* grad_weight,
                   void* grad_bias) {
  const int64_t width = whole_vectors<S>(a.columns);
  S* grad_x_hat = static_cast<S*>(scratch);
  S* staged = grad_x_hat + (has_epilogue(a) ? tile_rows * width : 0);
  S *zeros = staged + (has_prologue(a) ? tile_rows * width : 0), *sink = zeros + width;
  S *gw = static_cast<S*>(grad_weight), *gb = static_cast<S*>(grad_bias);
  if (has_prologue(a))
    backward_tiles<S, T, S>(a, begin, end, grad_x_hat, zeros, sink, gw, gb, [=, &a](int64_t row, int64_t i) {
      stage_row<S, T>(a, Rows{}, row, staged + i * width);
      return staged + i * width;
    });
  else
    backward_tiles<S, T, T>(a, begin, end, grad_x_hat, zeros, sink, gw, gb,
                            [&](int64_t row, int64_t) { return a.input.row<const T>(row); });
}

// The size of the scratch, in elements of S.
template <class S>
int64_t backward_scratch(const RowNormBackward& a) {
  const int64_t grad_x_hat = has_epilogue(a) ? tile_rows : 0, staged = has_prologue(a) ? tile_rows : 0;
  const int64_t left_over = a.rows_per_group % tile_rows ? 2 : 0;
  return (grad_x_hat + staged + left_over) * whole_vectors<S>(a.columns);
}

}  // namespace ckpt::CKPT_ISA
