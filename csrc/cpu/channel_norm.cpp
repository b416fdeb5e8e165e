// The channel-norm ops on the CPU: shares rows, or pieces of them, out to threads.
#include "../channel_norm_ops.h"

#include <cstring>

#include "channel_statistics.h"
#include "device.h"
#include "row_tasks.h"

namespace ckpt {
namespace {

// Of planes, each is a task; of rows of channels, each piece of a sample.
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

// The steps of a norm, or of its gradient, in one call: what small inputs pay for is calls.
struct WholeNorm : ChannelNormOps<Cpu> {
  // Two numbers for each piece of each channel, for the time of a call.
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

  static void forward(Tensor input, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias, Tensor output,
                      Tensor mean, Tensor var, Tensor coefficients, bool planes, int64_t samples, int64_t piece_rows,
                      int64_t groups, double eps, int64_t activation) {
    const ScalarKind kind = kind_of(input);
    const Coefficient w(weight, kind, 0), b(bias, kind, 0);
    with_compute_type(kind, [&](auto compute) {
      using S = decltype(compute);
      ChannelMoments a;
      set_input(a, input, planes, samples, coefficients.size(2));
      const Pieces<S> moments(a, piece_rows);
      Cpu::run(a, input, kind);
      const Sets sets(a.samples, a.pieces, a.channels, groups);
      channel_statistics(
          sets, moments.first, moments.second, static_cast<const S*>(w.data()), static_cast<const S*>(b.data()),
          static_cast<S*>(data_of(mean, sets.count())), static_cast<S*>(data_of(var, sets.count())),
          static_cast<S*>(data_of(coefficients, 3 * sets.rows * sets.channels)), a.size, a.piece_rows, eps);
    });
    ChannelNormOps::forward(input, residual, coefficients, output, planes, samples, activation);
  }

  static void backward(Tensor grad_output, Tensor input, OptionalTensor other, OptionalTensor weight, Tensor var,
                       Tensor coefficients, OptionalTensor grad_input, OptionalTensor grad_residual,
                       OptionalTensor grad_weight, OptionalTensor grad_bias, bool planes, int64_t samples,
                       int64_t piece_rows, int64_t groups, double count, double eps, bool fixed, int64_t activation,
                       bool by_output) {
    const ScalarKind kind = kind_of(input);
    const Coefficient w(weight, kind, 0);
    with_compute_type(kind, [&](auto compute) {
      using S = decltype(compute);
      ChannelSums a;
      set_input(a, input, planes, samples, coefficients.size(2));
      a.coefficients = coefficients_of(coefficients, 3, a);
      a.grad_output = dense(grad_output, a);
      a.other = dense(other, a);
      a.by_output = by_output;
      a.activation = int(activation);
      const Pieces<S> sums(a, piece_rows);
      Cpu::run(a, input, kind);

      const Sets sets(a.samples, a.pieces, a.channels, groups);
      const int64_t three = 3 * sets.rows * sets.channels;
      const Scratch room(2 * three * sizeof(S));
      S* six = room.as<S>();
      std::memcpy(six, data_of(coefficients, three), three * sizeof(S));
      channel_tilts(sets, sums.first, sums.second, static_cast<const S*>(data_of(var, sets.count())),
                    static_cast<const S*>(w.data()), six, static_cast<S*>(data_of(grad_weight, a.channels)),
                    static_cast<S*>(data_of(grad_bias, a.channels)), count, eps, fixed);
      if (!grad_input && !grad_residual) return;

      ChannelBackward last;
      static_cast<ChannelNorm&>(last) = a;
      last.coefficients = {six, a.coefficients.by_sample};
      last.grad_output = a.grad_output;
      last.other = a.other;
      last.by_output = by_output;
      last.activation = a.activation;
      last.grad_input = dense(grad_input, a);
      last.grad_residual = dense(grad_residual, a);
      Cpu::run(last, input, kind);
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
