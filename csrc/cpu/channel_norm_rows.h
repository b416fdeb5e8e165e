// The loops of the channel-norm family: y = act(z) with z = (x - mean) * scale + bias + other (BatchNorm: S. Ioffe and
// C. Szegedy, 2015; GroupNorm: Y. Wu and K. He, 2018; InstanceNorm: D. Ulyanov et al., 2016).
//
// Backward, with g = dL/dy * act'(z) = dL/dz, which is the gradient of the residual too, x_hat = (x - mean) * rstd over
// a set of N elements that share their statistics, and scale = weight * rstd: dx_hat_i/dx_j = rstd * ((i == j) - 1 / N
// - x_hat_i * x_hat_j / N), as for the rows of row_norm_backward_rows.h. So
//   dL/dx = rstd * (weight * g - x_hat * c1 - c2) with c1 = mean(weight * g * x_hat), c2 = mean(weight * g)
//         = g * scale - (x - mean) * rstd^2 * c1 - rstd * c2,
//   dL/dweight = sum(g * x_hat) and dL/dbias = sum(g) over a channel.
// First come the sums of g and g * (x - mean) by channel; channel_statistics.h makes the coefficients of the second
// line of them; then dL/dx is written. With fixed statistics c1 = c2 = 0. S is the compute type, T the storage type.
#pragma once

#include "../channel_norm.h"
#include "activation_rows.h"
#include "channel_moments_rows.h"
#include "channel_rows.h"
#include "target.h"
#include "vec.h"
#include "vec_loops.h"
#include "vec_memory.h"
#include "vec_stream.h"

namespace ckpt::CKPT_ISA {

using C = ChannelCoefficients;

// The coefficients of one row: single numbers for a plane, which is one channel; vectors with channels last. Those of a
// plane are copied, because the compiler must assume that a store of results overwrites them.
template <bool planes, class S, int count>
struct RowCoefficients {
  const S* data;
  int64_t stride;
  S single[count];

  CKPT_INLINE RowCoefficients(const C& all, const ChannelNorm& a, int64_t row) {
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

// z, the argument of the activation, for one vector of a row with the deviations d = x - mean.
template <class Coefficients, class S, class T, class Lanes>
CKPT_INLINE Vec<S> activated(const Coefficients& c, Vec<S> d, const T* other, int64_t j, Lanes lanes) {
  Vec<S> z = d * c.at(C::scale, j, lanes) + c.at(C::bias, j, lanes);
  return other ? z + load(other + j, lanes) : z;
}

// g = dL/dz for one vector of a row. With `by_output`, `other` is the block's output, which has the sign of z, and the
// derivative of the activation depends on that sign only.
template <class S, class T, class Block, class Coefficients, class Function, class Lanes>
CKPT_INLINE Vec<S> gradient(const Block& a, const Coefficients& c, Vec<S> d, const T* grad_output, const T* other,
                            int64_t j, Function function, Lanes lanes) {
  Vec<S> z = a.by_output ? load(other + j, lanes) : activated(c, d, other, j, lanes);
  return load(grad_output + j, lanes) * derivative_of<T>(function, z);
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
        Vec<S> z = activated(c, load(x + j, lanes) - c.at(C::mean, j, lanes), other, j, lanes);
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
        Vec<S> d = load(x + j, lanes) - c.at(C::mean, j, lanes);
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
      for_row_tiles(
          sample_begin + a.piece_begin(piece), sample_begin + a.piece_end(piece), [&](int64_t row, auto tile) {
            const T *x = row_at<T>(a.input, row, a.channels), *other = row_at<T>(a.other, row, a.channels);
            const T* grad_output = row_at<T>(a.grad_output, row, a.channels);
            step<S>(a.channels, [&](int64_t j, auto lanes) {
              Vec<S> mean = c.at(C::mean, j, lanes), s = load(sum + j, lanes), t = load(sum_deviations + j, lanes);
              for (int i = 0; i < tile.value; ++i) {
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
        Vec<S> d = load(x + j, lanes) - c.at(C::mean, j, lanes);
        Vec<S> g = gradient(a, c, d, grad_output, other, j, function, lanes);
        if (a.grad_residual) grad_residual.put(j, g, lanes);
        if (a.grad_input)
          grad_input.put(
              j,
              g * c.at(C::by_gradient, j, lanes) + (d * c.at(C::by_deviation, j, lanes) + c.at(C::constant, j, lanes)),
              lanes);
      });
    }
  });
  end_streams();
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
  return {channel_moments<S, T>, channel_sums<S, T>, channel_forward<S, T>, channel_backward<S, T>};
}
CKPT_DEFINE_LOOPS(ChannelNormLoops, channel_norm_loops)

}  // namespace ckpt::CKPT_ISA
