// The separate ops for the coefficients of a channel norm, on the CPU.
#include "channel_statistics.h"

#include "device.h"

namespace ckpt {
namespace {

// The elements of an operand of compute type S.
template <class S>
struct Numbers {
  const Operands<View>& operands;
  template <class T>
  S* operator()(const char* name, const T& t, int64_t numel) const {
    return static_cast<S*>(operands.numbers(name, t, numel));
  }
};

Sets sets_of(const View& by_piece, int64_t groups) {
  STD_TORCH_CHECK(by_piece.dim() == 3 && by_piece.is_contiguous(), "expected (samples, pieces, channels)");
  return {by_piece.size(0), by_piece.size(1), by_piece.size(2), groups};
}

void statistics(View means, View squares, View mean, View var, int64_t groups, int64_t size, int64_t piece_rows) {
  const Operands<View> operands("means", means);
  const Sets sets = sets_of(means, groups);
  with_compute_type(operands.kind, [&](auto compute) {
    const Numbers<decltype(compute)> numbers{operands};
    const int64_t numel = means.numel();
    channel_statistics(sets, numbers("means", means, numel), numbers("squares", squares, numel),
                       numbers("mean", mean, sets.count()), numbers("var", var, sets.count()), size, piece_rows);
  });
}

void coefficients(View mean, View var, std::optional<View> weight, std::optional<View> bias, View coefficients,
                  double eps) {
  STD_TORCH_CHECK(coefficients.dim() == 3 && coefficients.size(0) == 3, "expected (3, samples or 1, channels)");
  const int64_t rows = coefficients.size(1);
  // A batch norm has statistics for all samples, one for each channel: no groups.
  const Sets sets(rows, 1, coefficients.size(2), mean.dim() == 2 ? mean.size(1) : 0);
  const Operands<View> operands("mean", mean);
  const ChannelCoefficient w(operands, "weight", weight, sets), b(operands, "bias", bias, sets);
  with_compute_type(operands.kind, [&](auto compute) {
    using S = decltype(compute);
    const Numbers<S> numbers{operands};
    channel_coefficients(sets, numbers("mean", mean, sets.count()), numbers("var", var, sets.count()), w.as<S>(),
                         b.as<S>(), numbers("coefficients", coefficients, 3 * sets.rows * sets.channels), eps);
  });
}

void backward_coefficients(View first, View second, View var, std::optional<View> weight, View coefficients,
                           std::optional<View> grad_weight, std::optional<View> grad_bias, int64_t groups, double count,
                           double eps, bool fixed) {
  const Operands<View> operands("first", first);
  const Sets sets = sets_of(first, groups);
  const ChannelCoefficient w(operands, "weight", weight, sets);
  with_compute_type(operands.kind, [&](auto compute) {
    using S = decltype(compute);
    const Numbers<S> numbers{operands};
    const int64_t numel = first.numel();
    channel_backward_coefficients(sets, numbers("first", first, numel), numbers("second", second, numel),
                                  numbers("var", var, sets.count()), w.as<S>(),
                                  numbers("coefficients", coefficients, 6 * sets.rows * sets.channels),
                                  numbers("grad_weight", grad_weight, sets.channels),
                                  numbers("grad_bias", grad_bias, sets.channels), count, eps, fixed);
  });
}

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CPU, m) {
  ckpt::CpuDevice::add<&ckpt::statistics>(m, "channel_statistics");
  ckpt::CpuDevice::add<&ckpt::coefficients>(m, "channel_coefficients");
  ckpt::CpuDevice::add<&ckpt::backward_coefficients>(m, "channel_backward_coefficients");
}
