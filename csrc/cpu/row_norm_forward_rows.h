// The forward loops of the row-norm family (csrc/row_norm.h): LayerNorm (J. Ba et al., "Layer normalization", 2016),
// RMSNorm (B. Zhang and R. Sennrich, "Root mean square layer normalization", 2019), and what comes before and after
// them.
//
// S is the compute type, T the storage type, and U the type in which u lies in memory: T where u is the input, S where
// it is staged in scratch.
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

// Writes y of one row, from u and its statistics.
template <class S, class T, class U>
void finish_row(const RowNormForward& a, const Constants<S>& constants, int64_t row, const U* u, S mean, S rstd) {
  Coefficients<S> weight(a.weight, row, a, constants.ones.value), bias(a.bias, row, a, constants.zeros.value);
  const Written<T> output(a.output, row, a.rows, a.columns);
  const bool cast = a.cast_before_weight;
  const Vec<S> means(mean), rstds(rstd);
  const T* next = a.input.row<const T>(row + 1 < a.rows ? row + 1 : row);
  for (int64_t j0 = 0; j0 < a.columns; j0 += chunk_columns) {
    int64_t n = a.columns - j0 < chunk_columns ? a.columns - j0 : chunk_columns;
    const S *w = weight.at(j0), *b = bias.at(j0);
    auto normalized = [=](int64_t j, auto lanes) {
      prefetch(next + j0 + j);
      Vec<S> x_hat = rounded_if<S, T>(cast, (load(u + j0 + j, lanes) - means) * rstds);
      return x_hat * load(w + j, lanes) + load(b + j, lanes);
    };
    if (!has_epilogue(a)) {
      sweep<S>(n, [&](int64_t j, auto lanes, auto) { output.put(j0 + j, normalized(j, lanes), lanes); });
    } else if (a.gate) {
      const T* gate = a.gate.row<const T>(row) + j0;
      visit_activation(a.activation, [&](auto function) {
        step<S>(n, [&](int64_t j, auto lanes) {
          output.put(j0 + j, normalized(j, lanes) * value_of<T>(function, load(gate + j, lanes)), lanes);
        });
      });
    } else {
      visit_activation(a.activation, [&](auto function) {
        step<S>(n,
                [&](int64_t j, auto lanes) { output.put(j0 + j, value_of<T>(function, normalized(j, lanes)), lanes); });
      });
    }
  }
}

template <class S, class T, class U>
CKPT_INLINE void forward_row(const RowNormForward& a, const Constants<S>& constants, int64_t row, const U* u) {
  S mean, rstd;
  if (a.given_statistics) {
    mean = a.mean ? static_cast<const S*>(a.mean)[row] : S(0);
    rstd = static_cast<const S*>(a.rstd)[row];
  } else {
    statistics_of(u, a.columns, a.centered, S(a.eps), &mean, &rstd);
    if (a.mean) static_cast<S*>(a.mean)[row] = mean;
    static_cast<S*>(a.rstd)[row] = rstd;
  }
  finish_row<S, T>(a, constants, row, u, mean, rstd);
}

template <class S, class T>
void forward_rows(const RowNormForward& a, int64_t begin, int64_t end, void* scratch) {
  const Constants<S> constants;
  const bool staged = has_prologue(a);
  S* u = static_cast<S*>(scratch);
  for (int64_t row = begin; row < end; ++row) {
    if (staged) {
      stage_row<S, T>(a, a.residual_out, row, u);
      forward_row<S, T>(a, constants, row, u);
    } else {
      forward_row<S, T>(a, constants, row, a.input.row<const T>(row));
    }
  }
  end_streams();
}

// In elements of S.
template <class S>
int64_t forward_scratch(const RowNormForward& a) {
  return has_prologue(a) ? whole_vectors<S>(a.columns) : 0;
}

}  // namespace ckpt::CKPT_ISA
