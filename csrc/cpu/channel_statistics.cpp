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

void statistics(View means, View squares, std::optional<View> weight, std::optional<View> bias, View mean, View var,
                View coefficients, int64_t groups, int64_t size, int64_t piece_rows, double eps) {
  const Sets sets = sets_of(means, groups);
  const Coefficient w(weight, kind_of(means), 0), b(bias, kind_of(means), 0);
  with_compute_type(kind_of(means), [&](auto compute) {
    using S = decltype(compute);
    const int64_t numel = means.numel();
    channel_statistics(sets, data<S>(means, numel), data<S>(squares, numel), static_cast<const S*>(w.data()),
                       static_cast<const S*>(b.data()), data<S>(mean, sets.count()), data<S>(var, sets.count()),
                       data<S>(coefficients, 3 * sets.rows * sets.channels), size, piece_rows, eps);
  });
}

void tilts(View first, View second, View var, std::optional<View> weight, View coefficients,
           std::optional<View> grad_weight, std::optional<View> grad_bias, int64_t groups, double count, double eps,
           bool fixed) {
  const Sets sets = sets_of(first, groups);
  const Coefficient w(weight, kind_of(first), 0);
  with_compute_type(kind_of(first), [&](auto compute) {
    using S = decltype(compute);
    const int64_t numel = first.numel();
    channel_tilts(sets, data<S>(first, numel), data<S>(second, numel), data<S>(var, sets.count()),
                  static_cast<const S*>(w.data()), data<S>(coefficients, 6 * sets.rows * sets.channels),
                  data<S>(grad_weight, sets.channels), data<S>(grad_bias, sets.channels), count, eps, fixed);
  });
}

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CPU, m) {
  ckpt::CpuDevice::add<&ckpt::statistics>(m, "channel_statistics");
  ckpt::CpuDevice::add<&ckpt::tilts>(m, "channel_tilts");
}
