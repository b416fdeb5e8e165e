// The loops of the channel-norm family. Included by each isa_*.cpp, inside its namespace.
//
// S is the compute type, T the storage type. A row is a plane, whose coefficients are single numbers, or one place of
// an image with its channels, whose coefficients are vectors.

// The coefficients of one row. Those of a plane are copied, because what is stored might overwrite them as far as the
// compiler knows.
template <bool planes, class S, int count>
struct RowCoefficients {
  const S* data;
  int64_t stride;
  S single[count];

  CKPT_INLINE RowCoefficients(const ChannelCoefficients& all, const ChannelNorm& a, int64_t row) {
    const int64_t sample = all.by_sample ? a.sample_of(row) : 0;
    stride = (all.by_sample ? a.samples : 1) * a.channels;
    data = static_cast<const S*>(all.data) + sample * a.channels + (planes ? row % a.channels : 0);
    for (int index = 0; planes && index < count; ++index) single[index] = data[index * stride];
  }
  template <class Lanes>
  CKPT_INLINE Vec<S> at(int index, int64_t j, Lanes lanes) const {
    if (planes) return Vec<S>(typename Vec<S>::Type{} + single[index]);
    return load(data + index * stride + j, lanes);
  }
};

template <class T>
CKPT_INLINE const T* row_at(const void* matrix, int64_t row, int64_t columns) {
  return matrix ? static_cast<const T*>(matrix) + row * columns : nullptr;
}

// z for one vector of a row: what the activation is given.
template <class Coefficients, class S, class T, class Lanes>
CKPT_INLINE Vec<S> activated(const Coefficients& c, Vec<S> d, const T* other, int64_t j, Lanes lanes) {
  Vec<S> z = d * c.at(1, j, lanes) + c.at(2, j, lanes);
  return other ? z + load(other + j, lanes) : z;
}

// g for one vector of a row: the gradient of z.
template <class S, class T, class Block, class Coefficients, class Function, class Lanes>
CKPT_INLINE Vec<S> gradient(const Block& a, const Coefficients& c, Vec<S> d, const T* grad_output, const T* other,
                            int64_t j, Function function, Lanes lanes) {
  Vec<S> z = a.by_output ? load(other + j, lanes) : activated(c, d, other, j, lanes);
  return load(grad_output + j, lanes) * derivative_of<T>(function, z);
}

template <class S, class T>
void channel_moments_of_planes(const ChannelMoments& a, int64_t begin, int64_t end) {
  for (int64_t plane = begin; plane < end; ++plane)
    moments_of(row_at<T>(a.input, plane, a.size), a.size, static_cast<S*>(a.first) + plane,
               static_cast<S*>(a.second) + plane);
}

// Rows that columns are summed over at a time, before the sums are touched.
constexpr int64_t column_rows = 4;

// Calls body(row, rows left) for blocks of column_rows rows of a piece, and single ones at its end, as compile-time
// counts.
template <int count>
struct Count {
  static constexpr int value = count;
};
template <class Body>
CKPT_INLINE void for_row_blocks(int64_t begin, int64_t end, Body body) {
  int64_t row = begin;
  for (; row + column_rows <= end; row += column_rows) body(row, Count<column_rows>{});
  for (; row < end; ++row) body(row, Count<1>{});
}

// A piece's moments about the mean of its first few rows, which is off only where these rows are.
template <class S, class T>
void channel_moments_of_rows(const ChannelMoments& a, int64_t begin, int64_t end) {
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t first = piece / a.pieces * a.size + a.piece_begin(piece);
    const int64_t count = a.piece_end(piece) - a.piece_begin(piece), few = count < 8 ? count : 8;
    const Vec<S> share(1.0 / double(count)), few_share(1.0 / double(few));
    for (int64_t j0 = 0; j0 < a.channels; j0 += chunk_columns) {
      const int64_t n = a.channels - j0 < chunk_columns ? a.channels - j0 : chunk_columns;
      const T* x = row_at<T>(a.input, first, a.channels) + j0;
      S* mean = static_cast<S*>(a.first) + piece * a.channels + j0;
      S* squares = static_cast<S*>(a.second) + piece * a.channels + j0;
      Chunk<S> center, sum, sum_squares;
      step<S>(n, [&](int64_t j, auto lanes) {
        Vec<S> guess(0.0);
        for (int64_t i = 0; i < few; ++i) guess += load(x + i * a.channels + j, lanes);
        store(center.value + j, guess * few_share, Full<S>{});
        store(sum.value + j, Vec<S>(0.0), Full<S>{});
        store(sum_squares.value + j, Vec<S>(0.0), Full<S>{});
      });
      for_row_blocks(0, count, [&](int64_t row, auto block) {
        const T* source = x + row * a.channels;
        step<S>(n, [&](int64_t j, auto lanes) {
          Vec<S> shift = load(center.value + j, Full<S>{});
          Vec<S> s = load(sum.value + j, Full<S>{}), q = load(sum_squares.value + j, Full<S>{});
          for (int i = 0; i < block.value; ++i) {
            Vec<S> d = load(source + i * a.channels + j, lanes) - shift;
            s += d;
            q += d * d;
          }
          store(sum.value + j, s, Full<S>{});
          store(sum_squares.value + j, q, Full<S>{});
        });
      });
      step<S>(n, [&](int64_t j, auto lanes) {
        Vec<S> s = load(sum.value + j, Full<S>{}), q = load(sum_squares.value + j, Full<S>{}) - s * s * share;
        store(mean + j, load(center.value + j, Full<S>{}) + s * share, lanes);
        store(squares + j, select(q < Vec<S>(0.0), Vec<S>(0.0), q), lanes);
      });
    }
  }
}

template <bool planes, class S, class T>
void channel_forward_rows(const ChannelForward& a, int64_t begin, int64_t end) {
  const int64_t columns = a.columns();
  visit_activation(a.activation, [&](auto function) {
    for (int64_t row = begin; row < end; ++row) {
      const RowCoefficients<planes, S, 3> c(a.coefficients, a, row);
      const T *x = row_at<T>(a.input, row, columns), *other = row_at<T>(a.other, row, columns);
      const Written<T> output(Rows{a.output, columns}, row, a.rows(), columns);
      step<S>(columns, [&](int64_t j, auto lanes) {
        Vec<S> z = activated(c, load(x + j, lanes) - c.at(0, j, lanes), other, j, lanes);
        output.put(j, value_of<T>(function, z), lanes);
      });
    }
  });
  end_streams();
}

template <class S, class T>
void channel_sums_of_planes(const ChannelSums& a, int64_t begin, int64_t end) {
  visit_activation(a.activation, [&](auto function) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const RowCoefficients<true, S, 3> c(a.coefficients, a, plane);
      const T *x = row_at<T>(a.input, plane, a.size), *other = row_at<T>(a.other, plane, a.size);
      const T* grad_output = row_at<T>(a.grad_output, plane, a.size);
      Accumulator<S> sum, sum_deviations;
      sweep<S>(a.size, [&](int64_t j, auto lanes, auto slot) {
        Vec<S> d = load(x + j, lanes) - c.at(0, j, lanes);
        Vec<S> g = lanes.keep(gradient(a, c, d, grad_output, other, j, function, lanes));
        sum.part[slot.index] += g;
        sum_deviations.part[slot.index] += g * d;
      });
      static_cast<S*>(a.first)[plane] = sum.total();
      static_cast<S*>(a.second)[plane] = sum_deviations.total();
    }
  });
}

template <class S, class T>
void channel_sums_of_rows(const ChannelSums& a, int64_t begin, int64_t end) {
  visit_activation(a.activation, [&](auto function) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t sample_begin = piece / a.pieces * a.size;
      const RowCoefficients<false, S, 3> c(a.coefficients, a, sample_begin);
      S* sum = static_cast<S*>(a.first) + piece * a.channels;
      S* sum_deviations = static_cast<S*>(a.second) + piece * a.channels;
      __builtin_memset(sum, 0, a.channels * sizeof(S));
      __builtin_memset(sum_deviations, 0, a.channels * sizeof(S));
      for_row_blocks(
          sample_begin + a.piece_begin(piece), sample_begin + a.piece_end(piece), [&](int64_t row, auto block) {
            const T *x = row_at<T>(a.input, row, a.channels), *other = row_at<T>(a.other, row, a.channels);
            const T* grad_output = row_at<T>(a.grad_output, row, a.channels);
            step<S>(a.channels, [&](int64_t j, auto lanes) {
              Vec<S> mean = c.at(0, j, lanes), s = load(sum + j, lanes), t = load(sum_deviations + j, lanes);
              for (int i = 0; i < block.value; ++i) {
                const int64_t k = i * a.channels;
                Vec<S> d = load(x + k + j, lanes) - mean;
                Vec<S> g = gradient(a, c, d, grad_output + k, other ? other + k : nullptr, j, function, lanes);
                s += g;
                t += g * d;
              }
              store(sum + j, s, lanes);
              store(sum_deviations + j, t, lanes);
            });
          });
    }
  });
}

template <bool planes, class S, class T>
void channel_backward_rows(const ChannelBackward& a, int64_t begin, int64_t end) {
  const int64_t columns = a.columns();
  visit_activation(a.activation, [&](auto function) {
    for (int64_t row = begin; row < end; ++row) {
      const RowCoefficients<planes, S, 6> c(a.coefficients, a, row);
      const T *x = row_at<T>(a.input, row, columns), *other = row_at<T>(a.other, row, columns);
      const T* grad_output = row_at<T>(a.grad_output, row, columns);
      const Written<T> grad_input(Rows{a.grad_input, columns}, row, a.rows(), columns);
      const Written<T> grad_residual(Rows{a.grad_residual, columns}, row, a.rows(), columns);
      step<S>(columns, [&](int64_t j, auto lanes) {
        Vec<S> d = load(x + j, lanes) - c.at(0, j, lanes);
        Vec<S> g = gradient(a, c, d, grad_output, other, j, function, lanes);
        if (a.grad_residual) grad_residual.put(j, g, lanes);
        if (a.grad_input) grad_input.put(j, g * c.at(3, j, lanes) + (d * c.at(4, j, lanes) + c.at(5, j, lanes)), lanes);
      });
    }
  });
  end_streams();
}

template <class S, class T>
void channel_moments(const ChannelMoments& a, int64_t begin, int64_t end) {
  a.planes ? channel_moments_of_planes<S, T>(a, begin, end) : channel_moments_of_rows<S, T>(a, begin, end);
}
template <class S, class T>
void channel_forward(const ChannelForward& a, int64_t begin, int64_t end) {
  a.planes ? channel_forward_rows<true, S, T>(a, begin, end) : channel_forward_rows<false, S, T>(a, begin, end);
}
template <class S, class T>
void channel_sums(const ChannelSums& a, int64_t begin, int64_t end) {
  a.planes ? channel_sums_of_planes<S, T>(a, begin, end) : channel_sums_of_rows<S, T>(a, begin, end);
}
template <class S, class T>
void channel_backward(const ChannelBackward& a, int64_t begin, int64_t end) {
  a.planes ? channel_backward_rows<true, S, T>(a, begin, end) : channel_backward_rows<false, S, T>(a, begin, end);
}

template <class T>
constexpr ChannelNormLoops channel_norm_loops_for() {
  using S = typename ComputeType<T>::type;
  return {channel_moments<S, T>, channel_forward<S, T>, channel_sums<S, T>, channel_backward<S, T>};
}
CKPT_DEFINE_LOOPS(ChannelNormLoops, channel_norm_loops)
