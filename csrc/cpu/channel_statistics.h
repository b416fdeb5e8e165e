// Computes the coefficients of a channel norm (channel_norm.h) from the moments and sums of channels, in float64 on one
// thread. ckpt_kernels/backends/reference/channel_norm.py has the same functions in torch.
#pragma once

#include <cmath>

#include "../channel_norm.h"
#include "../operands.h"
#include "coefficient.h"
#include "scratch.h"

namespace ckpt {

// The sets of channels that share their statistics. With `groups` (GroupNorm and InstanceNorm) a set is `set_channels`
// adjacent channels of one sample; with groups = 0 (BatchNorm) a set is one channel of all samples. There are `rows`
// rows of `sets` sets each.
struct Sets {
  int64_t samples, pieces, channels, rows, sets, set_channels;

  Sets(int64_t samples, int64_t pieces, int64_t channels, int64_t groups)
      : samples(samples), pieces(pieces), channels(channels) {
    rows = groups ? samples : 1;
    sets = groups ? groups : channels;
    STD_TORCH_CHECK(channels % sets == 0, "expected groups of as many channels each");
    set_channels = channels / sets;
  }
  int64_t count() const { return rows * sets; }
  int64_t of(int64_t sample, int64_t channel) const { return (rows == 1 ? 0 : sample) * sets + channel / set_channels; }
  // Calls body(index into (samples, pieces, channels), piece, channel, set).
  template <class Body>
  void for_each(Body body) const {
    for (int64_t sample = 0; sample < samples; ++sample)
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t i = (sample * pieces + piece) * channels, first = of(sample, 0);
        // If a set is one channel, the compiler can vectorise the loop.
        if (set_channels == 1)
          for (int64_t channel = 0; channel < channels; ++channel) body(i + channel, piece, channel, first + channel);
        else
          for (int64_t set = 0, channel = 0; set < sets; ++set)
            for (const int64_t end = channel + set_channels; channel < end; ++channel)
              body(i + channel, piece, channel, first + set);
      }
  }
};

// A weight or bias of every channel, or none.
class ChannelCoefficient {
 public:
  ChannelCoefficient(const Operands<View>& operands, const char* name, const std::optional<View>& tensor,
                     const Sets& sets)
      : converted_(operands, name, tensor, 0) {
    STD_TORCH_CHECK(!tensor || tensor->numel() == sets.channels, name, " has not an element for every channel");
  }
  template <class S>
  const S* as() const {
    return static_cast<const S*>(converted_.data());
  }

 private:
  const Coefficient converted_;
};

// The same number of zeros.
class Zeros {
 public:
  explicit Zeros(int64_t count) : scratch_(count * sizeof(double)) {
    for (int64_t i = 0; i < count; ++i) (*this)[i] = 0;
  }
  double& operator[](int64_t i) const { return scratch_.as<double>()[i]; }

 private:
  const Scratch scratch_;
};

// Computes the mean and variance of every set from the moments of the pieces, and the coefficients mean, scale and
// bias. The variance of a set is the variance within the pieces plus the variance of the pieces' means.
template <class S>
void channel_statistics(const Sets& sets, const S* means, const S* squares, S* mean, S* var, int64_t size,
                        int64_t piece_rows) {
  auto elements = [&](int64_t piece) {
    return double(piece + 1 < sets.pieces ? piece_rows : size - (sets.pieces - 1) * piece_rows);
  };
  const double count = double(size) * double(sets.samples * sets.channels) / double(sets.count());
  const Zeros center(sets.count()), deviation(sets.count());
  sets.for_each(
      [&](int64_t i, int64_t piece, int64_t, int64_t set) { center[set] += elements(piece) / count * means[i]; });
  sets.for_each([&](int64_t i, int64_t piece, int64_t, int64_t set) {
    const double apart = means[i] - center[set];
    deviation[set] += squares[i] + elements(piece) * apart * apart;
  });
  for (int64_t set = 0; set < sets.count(); ++set) {
    mean[set] = S(center[set]);
    var[set] = S(deviation[set] / count);
  }
}

template <class S>
void channel_coefficients(const Sets& sets, const S* mean, const S* var, const S* weight, const S* bias,
                          S* coefficients, double eps) {
  const int64_t stride = sets.rows * sets.channels;
  for (int64_t row = 0; row < sets.rows; ++row)
    for (int64_t channel = 0; channel < sets.channels; ++channel) {
      const int64_t set = sets.of(row, channel);
      S* own = coefficients + row * sets.channels + channel;
      own[ChannelCoefficients::mean * stride] = mean[set];
      own[ChannelCoefficients::scale * stride] = S((weight ? weight[channel] : 1) / std::sqrt(double(var[set]) + eps));
      own[ChannelCoefficients::bias * stride] = bias ? bias[channel] : S(0);
    }
}

// Computes the gradients of weight and bias, and the other three coefficients, from the sums of g and of g * (x - mean)
// of every channel's pieces. `count` is the number of elements of a set; with fixed statistics c1 and c2 are 0.
template <class S>
void channel_backward_coefficients(const Sets& sets, const S* first, const S* second, const S* var, const S* weight,
                                   S* coefficients, S* grad_weight, S* grad_bias, double count, double eps,
                                   bool fixed) {
  const Zeros rstd(sets.count()), sum_h(sets.count()), sum_h_deviation(sets.count());
  const Zeros weight_sum(sets.channels), bias_sum(sets.channels);
  for (int64_t set = 0; set < sets.count(); ++set) rstd[set] = 1 / std::sqrt(double(var[set]) + eps);
  sets.for_each([&](int64_t i, int64_t, int64_t channel, int64_t set) {
    const double w = weight ? weight[channel] : 1;
    bias_sum[channel] += first[i];
    weight_sum[channel] += second[i] * rstd[set];
    sum_h[set] += w * first[i];
    sum_h_deviation[set] += w * second[i];
  });
  for (int64_t channel = 0; channel < sets.channels; ++channel) {
    if (grad_weight) grad_weight[channel] = S(weight_sum[channel]);
    if (grad_bias) grad_bias[channel] = S(bias_sum[channel]);
  }
  const int64_t stride = sets.rows * sets.channels;
  for (int64_t row = 0; row < sets.rows; ++row)
    for (int64_t channel = 0; channel < sets.channels; ++channel) {
      const int64_t set = sets.of(row, channel);
      S* own = coefficients + row * sets.channels + channel;
      const double share = -rstd[set] / count;
      own[ChannelCoefficients::by_gradient * stride] = own[ChannelCoefficients::scale * stride];
      // c1 = rstd * sum_h_deviation / count, c2 = sum_h / count.
      // With fixed statistics both are 0 even if the sums are NaN, because elements do not depend on each other.
      own[ChannelCoefficients::by_deviation * stride] =
          fixed ? S(0) : S(share * sum_h_deviation[set] * rstd[set] * rstd[set]);
      own[ChannelCoefficients::constant * stride] = fixed ? S(0) : S(share * sum_h[set]);
    }
}

// Calls body with a value of the compute type.
template <class Body>
void with_compute_type(ScalarKind kind, Body body) {
  if (kind == ScalarKind::float64)
    body(double{});
  else
    body(float{});
}

}  // namespace ckpt
