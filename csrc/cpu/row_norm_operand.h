// The input of a row norm: u, computed from the block's operands (csrc/row_norm.h), and the weight and bias of a row.
#pragma once

#include "../row_norm.h"
#include "activation_rows.h"
#include "chunk.h"
#include "dropout_rows.h"
#include "target.h"
#include "vec.h"
#include "vec_loops.h"
#include "vec_memory.h"
#include "vec_stream.h"

namespace ckpt::CKPT_ISA {

// A chunk of zeros, and one of ones.
template <class S>
struct Constants {
  Chunk<S> zeros{}, ones{};
  constexpr Constants() {
    for (int64_t j = 0; j < chunk_columns; ++j) ones.value[j] = 1;
  }
};
template <class S>
constexpr Constants<S> constants;

// A weight or bias for one row. Without a weight or bias, one chunk of a constant serves every chunk of columns.
template <class S>
struct Coefficients {
  const S* data;
  bool given;
  CKPT_INLINE Coefficients(const void* vector, int64_t row, const RowNorm& a, const S* constant)
      : data(vector ? static_cast<const S*>(vector) + (row < a.rows_per_group ? 0 : row / a.rows_per_group * a.columns)
                    : constant),
        given(vector) {}
  CKPT_INLINE const S* at(int64_t j0) const { return given ? data + j0 : data; }
};

// Whether u differs from the input and is staged in scratch.
CKPT_INLINE bool has_prologue(const RowNorm& a) { return a.pre_activation || a.residual || a.gate_before_norm; }

// Whether a gate multiplies the result of the norm.
CKPT_INLINE bool gate_last(const RowNorm& a) { return a.gate && !a.gate_before_norm; }

// Whether a computation follows z = x_hat * weight + bias.
CKPT_INLINE bool has_epilogue(const RowNorm& a) { return gate_last(a) || (a.activation && !a.gate_before_norm); }

template <class S, class T>
CKPT_INLINE void copy_to_chunk(const T* source, int64_t n, S* z) {
  sweep<S>(n, [=](int64_t j, auto lanes, auto) { store(z + j, load(source + j, lanes), Full<S>{}); });
}

// Writes u of one row, for a block with a prologue. residual + dropout(input) is also stored as residual_out, and u is
// the stored, rounded sum: the backward pass starts from residual_out and must compute the same u.
template <class S, class T>
void stage_row(const RowNorm& a, Rows residual_out, int64_t row, S* u) {
  const T* x = a.input.row<const T>(row);
  Chunk<S> factor;
  for (int64_t j0 = 0; j0 < a.columns; j0 += chunk_columns) {
    int64_t n = a.columns - j0 < chunk_columns ? a.columns - j0 : chunk_columns;
    S* z = u + j0;
    copy_to_chunk(x + j0, n, z);
    if (a.pre_activation) activate<T>(a.pre_activation, z, n);
    if (a.gate_before_norm) {
      copy_to_chunk(a.gate.row<const T>(row) + j0, n, factor.value);
      activate<T>(a.activation, factor.value, n);
      sweep<S>(n, [&](int64_t j, auto, auto) {
        Full<S> all;
        store(z + j, load(z + j, all) * load(factor.value + j, all), all);
      });
    }
    if (a.residual) {
      const T* residual = a.residual.row<const T>(row) + j0;
      const Written<T> sum(residual_out, row, a.rows, a.columns);
      if (a.dropout) {
        dropout_factors(a.dropout, row, j0, n, factor.value);
        sweep<S>(n, [=, &factor](int64_t j, auto lanes, auto) {
          Vec<S> total = load(residual + j, lanes) + load(z + j, lanes) * load(factor.value + j, lanes);
          sum.put(j0 + j, total, lanes);
          store(z + j, round_to<S, T>(total), Full<S>{});
        });
      } else {
        sweep<S>(n, [=](int64_t j, auto lanes, auto) {
          Vec<S> total = load(residual + j, lanes) + load(z + j, lanes);
          sum.put(j0 + j, total, lanes);
          store(z + j, round_to<S, T>(total), Full<S>{});
        });
      }
    }
  }
}

}  // namespace ckpt::CKPT_ISA
