// The ops that find the coefficients of a channel norm by themselves, on the CPU.
#include "channel_statistics.h"

#include "device.h"

namespace ckpt {
namespace {

template <class S, class T>
S* data(const T& t, int64_t numel) {
  return static_cast<S*>(data_of(t, numel));
}

Sets sets_of(const View& by_piece, int64_t groups) {
  STD_TORCH_CHECK(by_piece.dim() == 3 && by_piece.is_contiguous(), "expected (samples, pieces, channels)");
  return {by_piece.size(0), by_piece.size(1), by_piece.size(2), groups};
}

void statistics(View means, View squares, View mean, View var, int64_t groups, int64_t size, int64_t piece_rows) {
  const Sets sets = sets_of(means, groups);
  with_compute_type(kind_of(means), [&](auto compute) {
    using S = decltype(compute);
    const int64_t numel = means.numel();
    channel_statistics(sets, data<S>(means, numel), data<S>(squares, numel), data<S>(mean, sets.count()),
                       data<S>(var, sets.count()), size, piece_rows);
  });
}

void coefficients(View mean, View var, std::optional<View> weight, std::optional<View> bias, View coefficients,
                  double eps) {
  STD_TORCH_CHECK(coefficients.dim() == 3 && coefficients.size(0) == 3, "expected (3, samples or 1, channels)");
  const int64_t rows = coefficients.size(1);
  // A batch norm has statistics for all samples, one for each channel: no groups.
  const Sets sets(rows, 1, coefficients.size(2), mean.dim() == 2 ? mean.size(1) : 0);
  const Coefficient w(weight, kind_of(mean), 0), b(bias, kind_of(mean), 0);
  with_compute_type(kind_of(mean), [&](auto compute) {
    using S = decltype(compute);
    channel_coefficients(sets, data<S>(mean, sets.count()), data<S>(var, sets.count()), static_cast<const S*>(w.data()),
                         static_cast<const S*>(b.data()), data<S>(coefficients, 3 * sets.rows * sets.channels), eps);
  });
}

void backward_coefficients(View first, View second, View var, std::optional<View> weight, View coefficients,
                           std::optional<View> grad_weight, std::optional<View> grad_bias, int64_t groups, double count,
                           double eps, bool fixed) {
  const Sets sets = sets_of(first, groups);
  const Coefficient w(weight, kind_of(first), 0);
  with_compute_type(kind_of(first), [&](auto compute) {
    using S = decltype(compute);
    const int64_t numel = first.numel();
    channel_backward_coefficients(sets, data<S>(first, numel), data<S>(second, numel), data<S>(var, sets.count()),
                                  static_cast<const S*>(w.data()), data<S>(coefficients, 6 * sets.rows * sets.channels),
                                  data<S>(grad_weight, sets.channels), data<S>(grad_bias, sets.channels), count, eps,
                                  fixed);
  });
}

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CPU, m) {
  ckpt::CpuDevice::add<&ckpt::statistics>(m, "channel_statistics");
  ckpt::CpuDevice::add<&ckpt::coefficients>(m, "channel_coefficients");
  ckpt::CpuDevice::add<&ckpt::backward_coefficients>(m, "channel_backward_coefficients");
}
