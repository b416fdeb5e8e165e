// The channel-norm ops of one device: convert tensors to the plain structs of channel_norm.h.
#pragma once

#include "channel_norm.h"
#include "operands.h"

namespace ckpt {

// Device has a type Tensor, add<&function>(library, name), and run(block, tensor, kind) for each of the structs, where
// `tensor` determines the device.
template <class Device>
struct ChannelNormOps {
  using Tensor = typename Device::Tensor;
  using OptionalTensor = std::optional<Tensor>;

  // The operands of a block whose matrices are dense and of one size.
  struct Operands : ckpt::Operands<Tensor> {
    using ckpt::Operands<Tensor>::Operands;
    template <class T>
    void* dense(const char* name, const T& t, const ChannelNorm& a) const {
      return this->elements(name, t, a.rows() * a.columns());
    }
  };

  // The number of channels of (samples, pieces, channels) tensors.
  static int64_t channels_of(const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 3, "expected three dimensions, the last of them channels");
    return t.size(2);
  }

  static void set_input(ChannelNorm& a, const Operands& operands, const Tensor& input, bool planes, int64_t samples,
                        int64_t channels) {
    STD_TORCH_CHECK(samples > 0 && channels > 0 && input.numel() % (samples * channels) == 0, "expected a matrix of ",
                    samples, " samples of ", channels, " channels");
    a.planes = planes;
    a.samples = samples;
    a.channels = channels;
    a.size = input.numel() / (samples * channels);
    a.input = operands.dense("input", input, a);
  }

  static void set_results(ChannelReduction& a, const Operands& operands, const Tensor& first, const Tensor& second,
                          int64_t piece_rows) {
    a.piece_rows = piece_rows;
    a.pieces = first.size(1);
    STD_TORCH_CHECK(
        (a.planes ? a.pieces == 1 && piece_rows == a.size : (a.size + piece_rows - 1) / piece_rows == a.pieces),
        "expected the pieces to cover the rows");
    const int64_t numel = a.samples * a.pieces * a.channels;
    a.first = operands.numbers("the first result", first, numel);
    a.second = operands.numbers("the second result", second, numel);
  }

  static ChannelCoefficients coefficients_of(const Operands& operands, const Tensor& t, int64_t count,
                                             const ChannelNorm& a) {
    STD_TORCH_CHECK(t.size(0) == count && (t.size(1) == 1 || t.size(1) == a.samples) && t.size(2) == a.channels,
                    "expected ", count, " coefficients for each channel");
    return {operands.numbers("coefficients", t, count * t.size(1) * a.channels), t.size(1) != 1};
  }

  static void moments(Tensor input, Tensor mean, Tensor squares, bool planes, int64_t piece_rows) {
    const Operands operands("input", input);
    ChannelMoments a;
    set_input(a, operands, input, planes, mean.size(0), channels_of(mean));
    set_results(a, operands, mean, squares, piece_rows);
    Device::run(a, input, operands.kind);
  }

  static void forward(Tensor input, OptionalTensor residual, Tensor coefficients, Tensor output, bool planes,
                      int64_t samples, int64_t activation) {
    const Operands operands("input", input);
    ChannelForward a;
    set_input(a, operands, input, planes, samples, channels_of(coefficients));
    a.coefficients = coefficients_of(operands, coefficients, 3, a);
    a.other = operands.dense("residual", residual, a);
    a.output = operands.dense("output", output, a);
    a.activation = int(activation);
    Device::run(a, input, operands.kind);
  }

  static void sums(Tensor grad_output, Tensor input, OptionalTensor other, Tensor coefficients, Tensor first,
                   Tensor second, bool planes, int64_t piece_rows, int64_t activation, bool by_output) {
    const Operands operands("input", input);
    ChannelSums a;
    set_input(a, operands, input, planes, first.size(0), channels_of(first));
    set_results(a, operands, first, second, piece_rows);
    a.coefficients = coefficients_of(operands, coefficients, 3, a);
    a.grad_output = operands.dense("grad_output", grad_output, a);
    a.other = operands.dense("other", other, a);
    a.by_output = by_output;
    a.activation = int(activation);
    Device::run(a, input, operands.kind);
  }

  static void backward(Tensor grad_output, Tensor input, OptionalTensor other, Tensor coefficients,
                       OptionalTensor grad_input, OptionalTensor grad_residual, bool planes, int64_t samples,
                       int64_t activation, bool by_output) {
    const Operands operands("input", input);
    ChannelBackward a;
    set_input(a, operands, input, planes, samples, channels_of(coefficients));
    a.coefficients = coefficients_of(operands, coefficients, 6, a);
    a.grad_output = operands.dense("grad_output", grad_output, a);
    a.other = operands.dense("other", other, a);
    a.grad_input = operands.dense("grad_input", grad_input, a);
    a.grad_residual = operands.dense("grad_residual", grad_residual, a);
    a.by_output = by_output;
    a.activation = int(activation);
    Device::run(a, input, operands.kind);
  }

  template <class Library>
  static void add_to(Library& m) {
    Device::template add<&moments>(m, "channel_moments");
    Device::template add<&forward>(m, "channel_forward");
    Device::template add<&sums>(m, "channel_sums");
    Device::template add<&backward>(m, "channel_backward");
  }
};

}  // namespace ckpt
