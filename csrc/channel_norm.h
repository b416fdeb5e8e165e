// The operands of the channel-norm kernels, as plain pointers.
//
// Matrices are dense, (rows, columns). With `planes`, a row is one channel of one sample, a plane of `size` elements:
// (samples * channels, size). Without, channels are last: (samples * size, channels).
#pragma once

#include "rows.h"

namespace ckpt {

struct ChannelNorm {
  bool planes = true;
  int64_t samples = 0, channels = 0, size = 0;
  const void* input = nullptr;

  CKPT_HD int64_t rows() const { return samples * (planes ? channels : size); }
  CKPT_HD int64_t columns() const { return planes ? size : channels; }
  CKPT_HD int64_t sample_of(int64_t row) const { return row / (planes ? channels : size); }
};

// Two sums over the elements of each channel of each sample. With channels last, each sample is summed in pieces of
// piece_rows rows; a plane is one piece. `first` and `second` are (samples, pieces, channels), in the compute type.
struct ChannelReduction : ChannelNorm {
  int64_t pieces = 1, piece_rows = 0;
  void *first = nullptr, *second = nullptr;

  CKPT_HD int64_t piece_begin(int64_t piece) const { return piece % pieces * piece_rows; }
  CKPT_HD int64_t piece_end(int64_t piece) const {
    const int64_t end = piece_begin(piece) + piece_rows;
    return end < size ? end : size;
  }
};

// first = the mean, second = the sum of squared deviations from it.
struct ChannelMoments : ChannelReduction {};

// Coefficients for each channel, by sample or for all samples. With mean, scale = weight * rstd and bias,
//   z = (x - mean) * scale + bias + other,
// and with the other three, for the gradient g of z (c1 and c2 are those of cpu/channel_norm_rows.h),
//   grad_input = g * by_gradient + (x - mean) * by_deviation + constant,
//   by_gradient = scale, by_deviation = -rstd^2 * c1, constant = -rstd * c2.
struct ChannelCoefficients {
  enum Index { mean, scale, bias, by_gradient, by_deviation, constant };
  const void* data = nullptr;  // compute type, (3 or 6, samples or 1, channels)
  bool by_sample = false;
};

struct ChannelForward : ChannelNorm {
  ChannelCoefficients coefficients;  // mean, scale, bias
  const void* other = nullptr;       // the residual
  void* output = nullptr;            // activation(z)
  int activation = 0;
};

// first = the sum of g = grad_output * activation'(z), second = the sum of g * (x - mean). With by_output, `other` is
// the block's output and stands in for z: the derivative of such an activation depends only on the sign of z, which the
// output has too.
struct ChannelSums : ChannelReduction {
  ChannelCoefficients coefficients;
  const void *grad_output = nullptr, *other = nullptr;
  bool by_output = false;
  int activation = 0;
};

// grad_input by the coefficients, grad_residual = g; either may be null.
struct ChannelBackward : ChannelNorm {
  ChannelCoefficients coefficients;  // all six
  const void *grad_output = nullptr, *other = nullptr;
  void *grad_input = nullptr, *grad_residual = nullptr;
  bool by_output = false;
  int activation = 0;
};

}  // namespace ckpt
