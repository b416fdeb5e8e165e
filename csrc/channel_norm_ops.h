// The channel-norm ops of one device: their operands read into the plain structs of channel_norm.h.
#pragma once

#include "channel_norm.h"
#include "operands.h"

namespace ckpt {

// Device has a type Tensor, add<&function>(library, name), run(block, tensor, kind) for each of the structs; the tensor
// is on its device.
template <class Device>
struct ChannelNormOps {
  using Tensor = typename Device::Tensor;
  using OptionalTensor = std::optional<Tensor>;

  static void* dense(const OptionalTensor& t, const ChannelNorm& a) {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->numel() == a.rows() * a.columns() && t->is_contiguous(), "expected a contiguous (", a.rows(),
                    ", ", a.columns(), ") matrix");
    return t->data_ptr();
  }

  static void set_input(ChannelNorm& a, const Tensor& input, bool planes, int64_t samples, int64_t channels) {
    STD_TORCH_CHECK(samples > 0 && channels > 0 && input.numel() % (samples * channels) == 0, "expected a matrix of ",
                    samples, " samples of ", channels, " channels");
    a.planes = planes;
    a.samples = samples;
    a.channels = channels;
    a.size = input.numel() / (samples * channels);
    a.input = dense(input, a);
  }

  static void set_results(ChannelReduction& a, const Tensor& first, const Tensor& second, int64_t piece_rows) {
    a.piece_rows = piece_rows;
    a.pieces = first.size(1);
    STD_TORCH_CHECK(
        (a.planes ? a.pieces == 1 && piece_rows == a.size : (a.size + piece_rows - 1) / piece_rows == a.pieces),
        "expected the pieces to cover the rows");
    const int64_t numel = a.samples * a.pieces * a.channels;
    a.first = data_of(first, numel);
    a.second = data_of(second, numel);
  }

  static ChannelCoefficients coefficients_of(const Tensor& t, int64_t count, const ChannelNorm& a) {
    STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == count && (t.size(1) == 1 || t.size(1) == a.samples) &&
                        t.size(2) == a.channels && t.is_contiguous(),
                    "expected ", count, " coefficients for each channel");
    return {t.data_ptr(), t.size(1) != 1};
  }

  static void moments(Tensor input, Tensor mean, Tensor squares, bool planes, int64_t piece_rows) {
    ChannelMoments a;
    set_input(a, input, planes, mean.size(0), mean.size(2));
    set_results(a, mean, squares, piece_rows);
    Device::run(a, input, kind_of(input));
  }

  static void forward(Tensor input, OptionalTensor residual, Tensor coefficients, Tensor output, bool planes,
                      int64_t samples, int64_t activation) {
    ChannelForward a;
    set_input(a, input, planes, samples, coefficients.size(2));
    a.coefficients = coefficients_of(coefficients, 3, a);
    a.other = dense(residual, a);
    a.output = dense(output, a);
    a.activation = int(activation);
    Device::run(a, input, kind_of(input));
  }

  static void sums(Tensor grad_output, Tensor input, OptionalTensor other, Tensor coefficients, Tensor first,
                   Tensor second, bool planes, int64_t piece_rows, int64_t activation, bool by_output) {
    ChannelSums a;
    set_input(a, input, planes, first.size(0), first.size(2));
    set_results(a, first, second, piece_rows);
    a.coefficients = coefficients_of(coefficients, 3, a);
    a.grad_output = dense(grad_output, a);
    a.other = dense(other, a);
    a.by_output = by_output;
    a.activation = int(activation);
    Device::run(a, input, kind_of(input));
  }

  static void backward(Tensor grad_output, Tensor input, OptionalTensor other, Tensor coefficients,
                       OptionalTensor grad_input, OptionalTensor grad_residual, bool planes, int64_t samples,
                       int64_t activation, bool by_output) {
    ChannelBackward a;
    set_input(a, input, planes, samples, coefficients.size(2));
    a.coefficients = coefficients_of(coefficients, 6, a);
    a.grad_output = dense(grad_output, a);
    a.other = dense(other, a);
    a.grad_input = dense(grad_input, a);
    a.grad_residual = dense(grad_residual, a);
    a.by_output = by_output;
    a.activation = int(activation);
    Device::run(a, input, kind_of(input));
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
