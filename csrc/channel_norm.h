// What the channel-norm kernels compute, as plain pointers.
//
// Matrices are dense, (rows, columns): where there are planes, a row is a channel of a sample, (samples * channels,
// size); else channels are last, (samples * size, channels).
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

// For each channel of each sample, in pieces of piece_rows of its elements (where there are planes, in one): results
// are (count, samples, pieces, channels), in the compute type.
struct ChannelReduction : ChannelNorm {
  int64_t pieces = 1, piece_rows = 0;
  void *first = nullptr, *second = nullptr;

  CKPT_HD int64_t piece_begin(int64_t piece) const { return piece % pieces * piece_rows; }
  CKPT_HD int64_t piece_end(int64_t piece) const {
    const int64_t end = piece_begin(piece) + piece_rows;
    return end < size ? end : size;
  }
};

// Means and sums of squared deviations.
struct ChannelMoments : ChannelReduction {};

// z = (x - mean) * scale + bias + other, with mean, scale and bias for each channel, of each sample or of all; or, by
// output, z = other.
struct ChannelCoefficients {
  const void* data = nullptr;  // compute type, (count, samples or 1, channels)
  bool by_sample = false;
};

struct ChannelForward : ChannelNorm {
  ChannelCoefficients coefficients;  // mean, scale, bias
  const void* other = nullptr;       // the residual
  void* output = nullptr;            // activation(z)
  int activation = 0;
};

// Sums of g = grad_output * activation'(z) and of g * (x - mean).
struct ChannelSums : ChannelReduction {
  ChannelCoefficients coefficients;
  const void *grad_output = nullptr, *other = nullptr;
  bool by_output = false;
  int activation = 0;
};

// grad_input = g * factor + (x - mean) * tilt + shift, grad_residual = g.
struct ChannelBackward : ChannelNorm {
  ChannelCoefficients coefficients;  // mean, scale, bias, factor, tilt, shift
  const void *grad_output = nullptr, *other = nullptr;
  void *grad_input = nullptr, *grad_residual = nullptr;
  bool by_output = false;
  int activation = 0;
};

}  // namespace ckpt
