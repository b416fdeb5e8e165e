// The row loops of the row-norm family. Included by each isa_*.cpp, inside its namespace.
//
// S is the compute type, T the storage type. A row's normalised operand u is read where it lies when the block
// has nothing before the norm, and is staged in scratch (in the compute type) otherwise; U is its type.

template <class S>
CKPT_INLINE S square_root(S x) {
  return sizeof(S) == 4 ? S(__builtin_sqrtf(float(x))) : S(__builtin_sqrt(double(x)));
}

// An optional vector operand: the given one, or a chunk of a constant that every chunk reads again.
template <class S>
struct Coefficients {
  const S* data;
  bool given;
  Coefficients(const void* vector, int64_t row, const RowNorm& a, const S* constant)
      : data(vector ? static_cast<const S*>(vector) + row / a.rows_per_group * a.columns : constant), given(vector) {}
  CKPT_INLINE const S* at(int64_t j0) const { return given ? data + j0 : data; }
};

template <class S>
struct Constants {
  Chunk<S> zeros, ones;
  Constants() {
    for (int64_t j = 0; j < chunk_columns; ++j) zeros.value[j] = 0, ones.value[j] = 1;
  }
};

template <class S, class T>
CKPT_INLINE void copy_to_chunk(const T* source, int64_t n, S* z) {
  sweep<S>(n, [=](int64_t j, auto lanes, auto) { store(z + j, load(source + j, lanes), Full<S>{}); });
}

// Whether u is more than the input as it lies.
CKPT_INLINE bool has_prologue(const RowNorm& a) { return a.pre_activation || a.residual || a.gate_first; }

CKPT_INLINE bool gated_after(const RowNorm& a) { return a.gate && !a.gate_first; }

// Whether the way back from the output to the norm is more than a product with the weight.
CKPT_INLINE bool has_epilogue(const RowNorm& a) { return gated_after(a) || (a.activation && !a.gate_first); }

// u for one row, into `u`. residual + dropout(input) is rounded to storage, as what is kept for backward is.
template <class S, class T>
void stage_row(const RowNorm& a, Rows residual_out, int64_t row, S* u) {
  const T* x = a.input.row<const T>(row);
  Chunk<S> factor;
  for (int64_t j0 = 0; j0 < a.columns; j0 += chunk_columns) {
    int64_t n = a.columns - j0 < chunk_columns ? a.columns - j0 : chunk_columns;
    S* z = u + j0;
    copy_to_chunk(x + j0, n, z);
    if (a.pre_activation) activate<T>(a.pre_activation, z, n);
    if (a.gate_first) {
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
        sweep<S>(n, [&](int64_t j, auto lanes, auto) {
          Vec<S> total = load(residual + j, lanes) + load(z + j, lanes) * load(factor.value + j, lanes);
          sum.put(j0 + j, total, lanes);
          store(z + j, round_to<S, T>(total), Full<S>{});
        });
      } else {
        sweep<S>(n, [&](int64_t j, auto lanes, auto) {
          Vec<S> total = load(residual + j, lanes) + load(z + j, lanes);
          sum.put(j0 + j, total, lanes);
          store(z + j, round_to<S, T>(total), Full<S>{});
        });
      }
    }
  }
}

template <class S, class U>
CKPT_INLINE void row_moments(const RowNorm& a, const U* u, S* mean, S* rstd) {
  const S columns = S(a.columns);
  S center = 0, sum_squares;
  if (a.centered) {
    moments_of(u, a.columns, &center, &sum_squares);
  } else {
    Accumulator<S> squares;
    sweep_values<S>(u, a.columns, [&](Vec<S> value, auto, auto slot) { squares.part[slot.index] += value * value; });
    sum_squares = squares.total();
  }
  *mean = center;
  *rstd = S(1) / square_root(sum_squares / columns + S(a.eps));
}

template <class S, class T>
CKPT_INLINE Vec<S> rounded_if(bool cast, Vec<S> x_hat) {
  return cast ? round_to<S, T>(x_hat) : x_hat;
}

// y of one row from u and its statistics.
template <class S, class T, class U>
void finish_row(const RowNormForward& a, const Constants<S>& constants, int64_t row, const U* u, S mean, S rstd) {
  Coefficients<S> weight(a.weight, row, a, constants.ones.value), bias(a.bias, row, a, constants.zeros.value);
  const Written<T> output(a.output, row, a.rows, a.columns);
  const bool cast = a.cast_before_weight;
  const Vec<S> center(mean), scale(rstd);
  const T* next = a.input.row<const T>(row + 1 < a.rows ? row + 1 : row);
  for (int64_t j0 = 0; j0 < a.columns; j0 += chunk_columns) {
    int64_t n = a.columns - j0 < chunk_columns ? a.columns - j0 : chunk_columns;
    const S *w = weight.at(j0), *b = bias.at(j0);
    auto normalized = [=](int64_t j, auto lanes) {
      prefetch(next + j0 + j);
      Vec<S> x_hat = rounded_if<S, T>(cast, (load(u + j0 + j, lanes) - center) * scale);
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
    row_moments(a, u, &mean, &rstd);
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

// The state of one row in a block of backward rows.
template <class S, class T, class U>
struct BackwardRow {
  int64_t index;
  int64_t ahead;  // the row as far into the next block, which is fetched while this one is computed
  const U* u;
  const T *grad_output, *gate;
  T *grad_gate, *output;
  S mean, rstd;
  S* weighted;  // scratch: the gradient of x_hat, where it is not just grad_output * weight
  Vec<S> sum, sum_x_hat;

  CKPT_INLINE BackwardRow() {}
  template <class Lanes>
  CKPT_INLINE Vec<S> x_hat(int64_t column, Lanes lanes) const {
    return (load(u + column, lanes) - Vec<S>(mean)) * Vec<S>(rstd);
  }
};

// The ways back from the output's gradient g to that of z = x_hat * weight + bias, for one vector of a row.
struct Straight {
  static constexpr bool sloped = false;
  template <class Row, class V, class Lanes>
  CKPT_INLINE V operator()(const Row&, int64_t, Lanes, V g, V, V, V) const {
    return g;
  }
  template <class V>
  CKPT_INLINE V output(V z) const {
    return z;
  }
};
template <class T, class Function>
struct ThroughActivation {
  static constexpr bool sloped = true;
  template <class Row, class V, class Lanes>
  CKPT_INLINE V operator()(const Row&, int64_t, Lanes, V g, V seen, V weight, V bias) const {
    return g * derivative_of<T>(Function{}, seen * weight + bias);
  }
  template <class V>
  CKPT_INLINE V output(V z) const {
    return value_of<T>(Function{}, z);
  }
};
template <class T, class Function>
struct ThroughGate {
  static constexpr bool sloped = true;
  template <class Row, class V, class Lanes>
  CKPT_INLINE V operator()(const Row& row, int64_t column, Lanes lanes, V g, V seen, V weight, V) const {
    V gate = load(row.gate + column, lanes);
    if (row.grad_gate) store(row.grad_gate + column, g * (seen * weight) * derivative_of<T>(Function{}, gate), lanes);
    return g * value_of<T>(Function{}, gate);
  }
  template <class V>
  CKPT_INLINE V output(V z) const {
    return z;
  }
};

// One chunk of a block's rows: the two row sums of the norm's gradient, and the rows' share of the weight gradients.
template <class Way, class S, class T, class U>
CKPT_INLINE void reduce_chunk(const RowNormBackward& a, BackwardRow<S, T, U>* rows, int64_t j0, int64_t n, const S* w,
                              const S* b, S* grad_weight, S* grad_bias, Way way) {
  const bool cast = a.cast_before_weight;
  const T *next_u[block_rows], *next_g[block_rows];
  Vec<S> sum[block_rows], sum_x_hat[block_rows];
  for (int i = 0; i < block_rows; ++i) {
    next_u[i] = a.input.row<const T>(rows[i].ahead) + j0;
    next_g[i] = a.grad_output.row<const T>(rows[i].ahead) + j0;
    sum[i] = rows[i].sum;
    sum_x_hat[i] = rows[i].sum_x_hat;
  }
  step<S>(n, [&](int64_t j, auto lanes) {
    Vec<S> weight = load(w + j, lanes), bias = load(b + j, lanes);
    Vec<S> gw = load(grad_weight + j, lanes), gb = load(grad_bias + j, lanes);
    for (int i = 0; i < block_rows; ++i) {
      prefetch(next_u[i] + j);
      if (Way::sloped) prefetch(next_g[i] + j);
      Vec<S> x_hat = rows[i].x_hat(j0 + j, lanes), seen = rounded_if<S, T>(cast, x_hat);
      Vec<S> g = way(rows[i], j0 + j, lanes, load(rows[i].grad_output + j0 + j, lanes), seen, weight, bias);
      if (rows[i].output) store(rows[i].output + j0 + j, way.output(seen * weight + bias), lanes);
      gw += g * seen;
      gb += g;
      g = g * weight;
      sum[i] += g;
      sum_x_hat[i] += g * x_hat;
      if (Way::sloped) store(rows[i].weighted + j0 + j, g, Full<S>{});
    }
    store(grad_weight + j, gw, lanes);
    store(grad_bias + j, gb, lanes);
  });
  for (int i = 0; i < block_rows; ++i) rows[i].sum = sum[i], rows[i].sum_x_hat = sum_x_hat[i];
}

// The gradients of what u was made from, for one row.
template <class S, class T, class U>
void distribute_row(const RowNormBackward& a, const Constants<S>& constants, const BackwardRow<S, T, U>& r) {
  const int64_t row = r.index;
  Coefficients<S> weight(a.weight, row, a, constants.ones.value);
  const bool sloped = has_epilogue(a);
  const S mean_grad = a.centered ? sum_lanes(r.sum) / S(a.columns) : S(0);
  const S mean_grad_x_hat = sum_lanes(r.sum_x_hat) / S(a.columns);
  // (g - mean_grad - x_hat * mean_grad_x_hat) * rstd, as two products with what differs from row to row.
  const Vec<S> mean(r.mean), scale(r.rstd), tilt(-r.rstd * r.rstd * mean_grad_x_hat), shift(-r.rstd * mean_grad);
  const T* next = a.grad_output.row<const T>(r.ahead);
  Written<T> grad_input(a.grad_input, row, a.rows, a.columns);
  // What is read again for the residual's gradient had better be in cache.
  if (a.grad_residual) grad_input.streams = false;
  Chunk<S> slope, gate;
  for (int64_t j0 = 0; j0 < a.columns; j0 += chunk_columns) {
    int64_t n = a.columns - j0 < chunk_columns ? a.columns - j0 : chunk_columns;
    const S* w = weight.at(j0);
    auto grad_u = [&](int64_t j, auto lanes) {
      if (!sloped) prefetch(next + j0 + j);
      Vec<S> g = sloped ? load(r.weighted + j0 + j, lanes) : load(r.grad_output + j0 + j, lanes) * load(w + j, lanes);
      return (load(r.u + j0 + j, lanes) - mean) * tilt + (g * scale + shift);
    };
    if (a.pre_activation) {
      copy_to_chunk(a.input.row<const T>(row) + j0, n, slope.value);
      differentiate<T>(a.pre_activation, slope.value, n);
      sweep<S>(n, [&](int64_t j, auto lanes, auto) {
        grad_input.put(j0 + j, grad_u(j, lanes) * load(slope.value + j, lanes), lanes);
      });
    } else if (a.gate_first) {
      const T* input = a.input.row<const T>(row) + j0;
      T* grad_gate = a.grad_gate.row<T>(row) + j0;
      copy_to_chunk(a.gate.row<const T>(row) + j0, n, gate.value);
      copy_to_chunk(gate.value, n, slope.value);
      activate<T>(a.activation, gate.value, n);
      differentiate<T>(a.activation, slope.value, n);
      sweep<S>(n, [&](int64_t j, auto lanes, auto) {
        Vec<S> g = grad_u(j, lanes);
        grad_input.put(j0 + j, g * load(gate.value + j, lanes), lanes);
        store(grad_gate + j, g * load(input + j, lanes) * load(slope.value + j, lanes), lanes);
      });
    } else if (a.grad_residual_out) {
      const T* above = a.grad_residual_out.row<const T>(row) + j0;
      sweep<S>(n, [&](int64_t j, auto lanes, auto) {
        grad_input.put(j0 + j, grad_u(j, lanes) + load(above + j, lanes), lanes);
      });
    } else {
      sweep<S>(n, [&](int64_t j, auto lanes, auto) { grad_input.put(j0 + j, grad_u(j, lanes), lanes); });
    }
    if (a.grad_residual) {
      // grad_input so far is the gradient of the sum; the residual takes it as it is, the input through the mask.
      T* grad_residual = a.grad_residual.row<T>(row) + j0;
      dropout_factors(a.dropout, row, j0, n, slope.value);
      sweep<S>(n, [&](int64_t j, auto lanes, auto) {
        Vec<S> g = load(grad_input.row + j0 + j, lanes);
        store(grad_residual + j, g, lanes);
        store(grad_input.row + j0 + j, g * load(slope.value + j, lanes), lanes);
      });
    }
  }
}

// The first `live` rows of the block are there; the others are zeros, which add nothing.
template <class S, class T, class U>
void backward_block(const RowNormBackward& a, const Constants<S>& constants, BackwardRow<S, T, U>* rows, int64_t live,
                    S* grad_weight, S* grad_bias) {
  Chunk<S> unused;  // where the gradients go that nobody wants
  Coefficients<S> weight(a.weight, rows[0].index, a, constants.ones.value);
  Coefficients<S> bias(a.bias, rows[0].index, a, constants.zeros.value);
  for (int64_t j0 = 0; j0 < a.columns; j0 += chunk_columns) {
    int64_t n = a.columns - j0 < chunk_columns ? a.columns - j0 : chunk_columns;
    auto reduce = [&](auto way) {
      reduce_chunk(a, rows, j0, n, weight.at(j0), bias.at(j0), grad_weight ? grad_weight + j0 : unused.value,
                   grad_bias ? grad_bias + j0 : unused.value, way);
    };
    if (!has_epilogue(a))
      reduce(Straight{});
    else if (a.gate)
      visit_activation(a.activation, [&](auto function) { reduce(ThroughGate<T, decltype(function)>{}); });
    else
      visit_activation(a.activation, [&](auto function) { reduce(ThroughActivation<T, decltype(function)>{}); });
  }
  if (a.grad_input)
    for (int64_t i = 0; i < live; ++i) distribute_row<S, T, U>(a, constants, rows[i]);
}

// `zeros` and `sink` are rows of scratch, which are there if the last block may have rows left over.
template <class S, class T, class U, class Source>
CKPT_INLINE void backward_blocks(const RowNormBackward& a, int64_t begin, int64_t end, S* weighted, S* zeros, S* sink,
                                 S* grad_weight, S* grad_bias, Source source) {
  const Constants<S> constants;
  const int64_t width = whole_vectors<S>(a.columns);
  BackwardRow<S, T, U> rows[block_rows];
  if ((end - begin) % block_rows) __builtin_memset(zeros, 0, width * sizeof(S));
  for (int64_t first = begin; first < end; first += block_rows) {
    const int64_t live = end - first < block_rows ? end - first : block_rows;
    for (int64_t i = 0; i < block_rows; ++i) {
      const int64_t row = first + (i < live ? i : 0), ahead = row + block_rows;
      BackwardRow<S, T, U>& r = rows[i];
      r.index = row;
      r.ahead = ahead < a.rows ? ahead : row;
      r.weighted = weighted + i * width;
      r.sum = r.sum_x_hat = Vec<S>(0.0);
      if (i < live) {
        r.u = source(row, i);
        r.grad_output = a.grad_output.row<const T>(row);
        r.gate = gated_after(a) ? a.gate.row<const T>(row) : nullptr;
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
    backward_block(a, constants, rows, live, grad_weight, grad_bias);
  }
  end_streams();
}

// All rows from begin to end are of one group.
template <class S, class T>
void backward_rows(const RowNormBackward& a, int64_t begin, int64_t end, void* scratch, void* grad_weight,
                   void* grad_bias) {
  const int64_t width = whole_vectors<S>(a.columns);
  S* weighted = static_cast<S*>(scratch);
  S* staged = weighted + (has_epilogue(a) ? block_rows * width : 0);
  S *zeros = staged + (has_prologue(a) ? block_rows * width : 0), *sink = zeros + width;
  S *gw = static_cast<S*>(grad_weight), *gb = static_cast<S*>(grad_bias);
  if (has_prologue(a))
    backward_blocks<S, T, S>(a, begin, end, weighted, zeros, sink, gw, gb, [=, &a](int64_t row, int64_t i) {
      stage_row<S, T>(a, Rows{}, row, staged + i * width);
      return staged + i * width;
    });
  else
    backward_blocks<S, T, T>(a, begin, end, weighted, zeros, sink, gw, gb,
                             [&](int64_t row, int64_t) { return a.input.row<const T>(row); });
}

template <class S>
int64_t forward_scratch(const RowNormForward& a) {
  return has_prologue(a) ? whole_vectors<S>(a.columns) : 0;
}

template <class S>
int64_t backward_scratch(const RowNormBackward& a) {
  const int64_t weighted = has_epilogue(a) ? block_rows : 0, staged = has_prologue(a) ? block_rows : 0;
  const int64_t left_over = a.rows_per_group % block_rows ? 2 : 0;
  return (weighted + staged + left_over) * whole_vectors<S>(a.columns);
}

template <class T>
constexpr RowNormLoops row_norm_loops_for() {
  using S = typename ComputeType<T>::type;
  return {forward_rows<S, T>, backward_rows<S, T>, forward_scratch<S>, backward_scratch<S>};
}
CKPT_DEFINE_LOOPS(RowNormLoops, row_norm_loops)
