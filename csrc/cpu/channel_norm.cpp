// The channel-norm ops on the CPU: distributes rows, or pieces of rows, to threads.
#include "../channel_norm_ops.h"

#include "channel_statistics.h"
#include "device.h"
#include "row_tasks.h"

namespace ckpt {
namespace {

// Each plane is a task; with channels last, each piece of a sample.
template <class Block, class Loop>
void for_pieces_of(const Block& a, Loop loop) {
  const int64_t tasks = a.planes ? a.samples * a.channels : a.samples * a.pieces;
  const int64_t elements = a.planes ? a.size : a.piece_rows * a.channels;
  torch::stable::parallel_for(0, tasks, grain(elements), [&](int64_t begin, int64_t end) { loop(a, begin, end); });
}

template <class Block, class Loop>
void for_rows_of(const Block& a, Loop loop) {
  torch::stable::parallel_for(0, a.rows(), grain(a.columns()),
                              [&](int64_t begin, int64_t end) { loop(a, begin, end); });
}

struct Cpu : CpuDevice {
  static void run(const ChannelMoments& a, const View&, ScalarKind kind) {
    for_pieces_of(a, channel_norm_loops(kind).moments);
  }
  static void run(const ChannelForward& a, const View&, ScalarKind kind) {
    for_rows_of(a, channel_norm_loops(kind).forward);
  }
  static void run(const ChannelSums& a, const View&, ScalarKind kind) {
    for_pieces_of(a, channel_norm_loops(kind).sums);
  }
  static void run(const ChannelBackward& a, const View&, ScalarKind kind) {
    for_rows_of(a, channel_norm_loops(kind).backward);
  }
};

// All steps of a norm, or of its gradient, in one op: for small inputs the overhead of an op exceeds the work.
struct WholeNorm : ChannelNormOps<Cpu> {
  // Scratch for the two sums of each piece of each channel.
  template <class S>
  class Pieces {
   public:
    Pieces(ChannelReduction& a, int64_t piece_rows)
        : pieces_(a.planes ? 1 : divide_up(a.size, piece_rows)),
          numel_(a.samples * pieces_ * a.channels),
          values_(2 * numel_ * sizeof(S)) {
      a.piece_rows = piece_rows;
      a.pieces = pieces_;
      a.first = first = values_.template as<S>();
      a.second = second = first + numel_;
    }
    S *first, *second;

   private:
    const int64_t pieces_, numel_;
    const Scratch values_;
  };

  // Computes the coefficients from the statistics, into the first three of `count` rows.
  template <class S>
  class Coefficients {
   public:
    Coefficients(const Operands& operands, const Sets& sets, int64_t count, const S* mean, const S* var,
                 const OptionalTensor& weight, const OptionalTensor& bias, double eps)
        : weight_(operands, "weight", weight, sets),
          bias_(operands, "bias", bias, sets),
          values_(count * sets.rows * sets.channels * sizeof(S)),
          data(values_.template as<S>()) {
      channel_coefficients(sets, mean, var, this->weight(), bias_.template as<S>(), data, eps);
    }
    const S* weight() const { return weight_.template as<S>(); }

   private:
    const ChannelCoefficient weight_, bias_;
    const Scratch values_;

   public:
    S* const data;
  };

  // The number of channels of a matrix of planes, of rows with channels last, or of (samples, channels, *space).
  static int64_t channels_in(const Tensor& input, bool planes, int64_t samples) {
    STD_TORCH_CHECK(input.dim() > 1 && samples > 0, "expected samples of channels");
    return planes && input.dim() == 2 ? input.size(0) / samples : input.size(1);
  }

  static void forward(Tensor input, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias, Tensor output,
                      Tensor mean, Tensor var, bool planes, int64_t samples, int64_t piece_rows, int64_t groups,
                      double eps, int64_t activation, bool given_statistics) {
    const Operands operands("input", input);
    with_compute_type(operands.kind, [&](auto compute) {
      using S = decltype(compute);
      ChannelMoments a;
      set_input(a, operands, input, planes, samples, channels_in(input, planes, samples));
      const Sets own(a.samples, planes ? 1 : divide_up(a.size, piece_rows), a.channels, groups);
      S* const means = static_cast<S*>(operands.numbers("mean", mean, own.count()));
      S* const vars = static_cast<S*>(operands.numbers("var", var, own.count()));
      if (!given_statistics) {
        const Pieces<S> moments(a, piece_rows);
        Cpu::run(a, input, operands.kind);
        channel_statistics(own, moments.first, moments.second, means, vars, a.size, a.piece_rows);
      }
      const Coefficients<S> coefficients(operands, own, 3, means, vars, weight, bias, eps);
      ChannelForward last;
      static_cast<ChannelNorm&>(last) = a;
      last.coefficients = {coefficients.data, own.rows != 1};
      last.other = operands.dense("residual", residual, a);
      last.output = operands.dense("output", output, a);
      last.activation = int(activation);
      Cpu::run(last, input, operands.kind);
    });
  }

  static void backward(Tensor grad_output, Tensor input, OptionalTensor other, OptionalTensor weight,
                       OptionalTensor bias, Tensor mean, Tensor var, OptionalTensor grad_input,
                       OptionalTensor grad_residual, OptionalTensor grad_weight, OptionalTensor grad_bias, bool planes,
                       int64_t samples, int64_t piece_rows, int64_t groups, double count, double eps, bool fixed,
                       int64_t activation, bool by_output) {
    const Operands operands("input", input);
    with_compute_type(operands.kind, [&](auto compute) {
      using S = decltype(compute);
      ChannelSums a;
      set_input(a, operands, input, planes, samples, channels_in(input, planes, samples));
      const Sets sets(a.samples, planes ? 1 : divide_up(a.size, piece_rows), a.channels, groups);
      const S* const means = static_cast<const S*>(operands.numbers("mean", mean, sets.count()));
      const S* const vars = static_cast<const S*>(operands.numbers("var", var, sets.count()));
      const Coefficients<S> six(operands, sets, 6, means, vars, weight, bias, eps);
      a.coefficients = {six.data, sets.rows != 1};
      a.grad_output = operands.dense("grad_output", grad_output, a);
      a.other = operands.dense("other", other, a);
      a.by_output = by_output;
      a.activation = int(activation);
      const Pieces<S> sums(a, piece_rows);
      Cpu::run(a, input, operands.kind);

      channel_backward_coefficients(sets, sums.first, sums.second, vars, six.weight(), six.data,
                                    static_cast<S*>(operands.numbers("grad_weight", grad_weight, a.channels)),
                                    static_cast<S*>(operands.numbers("grad_bias", grad_bias, a.channels)), count, eps,
                                    fixed);
      if (!grad_input && !grad_residual) return;

      ChannelBackward last;
      static_cast<ChannelNorm&>(last) = a;
      last.coefficients = a.coefficients;
      last.grad_output = a.grad_output;
      last.other = a.other;
      last.by_output = by_output;
      last.activation = a.activation;
      last.grad_input = operands.dense("grad_input", grad_input, a);
      last.grad_residual = operands.dense("grad_residual", grad_residual, a);
      Cpu::run(last, input, operands.kind);
    });
  }
};

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CPU, m) {
  ckpt::ChannelNormOps<ckpt::Cpu>::add_to(m);
  ckpt::CpuDevice::add<&ckpt::WholeNorm::forward>(m, "channel_norm_forward");
  ckpt::CpuDevice::add<&ckpt::WholeNorm::backward>(m, "channel_norm_backward");
}
