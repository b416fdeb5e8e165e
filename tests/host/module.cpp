// The CUDA kernels on the host, for the tests: operands come by name, as (address, strides and sizes of rows).
#include "cuda_on_host.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/cuda/bias_act_kernels.cuh"
#include "../../csrc/cuda/channel_norm_launch.cuh"
#include "../../csrc/cuda/dyt_kernels.cuh"
#include "../../csrc/cuda/glu_kernels.cuh"
#include "../../csrc/cuda/rotary_launch.cuh"
#include "../../csrc/cuda/row_norm_launch.cuh"

namespace py = pybind11;
using namespace ckpt;

namespace {

class Operands {
 public:
  explicit Operands(py::dict operands) : operands_(std::move(operands)) {}

  Rows rows(const char* name) const {
    if (!has(name)) return {};
    auto [data, levels] = operands_[name].cast<std::pair<uintptr_t, std::vector<int64_t>>>();
    Rows rows{reinterpret_cast<void*>(data), levels[0]};
    if (levels.size() > 1)
      rows.inner = levels[1], rows.middle = levels[2], rows.inner_stride = levels[3], rows.middle_stride = levels[4];
    return rows;
  }
  void* data(const char* name) const { return rows(name).data; }
  template <class T>
  T option(const char* name, T absent) const {
    return has(name) ? operands_[name].cast<T>() : absent;
  }

 private:
  bool has(const char* name) const { return operands_.contains(name) && !operands_[name].is_none(); }
  py::dict operands_;
};

const HostLaunch<Grid> host_launch;

Dropout read_dropout(const Operands& operands) {
  const void* seed = operands.data("seed");
  return seed ? Dropout::make(operands.option<double>("dropout_p", 0), static_cast<const int64_t*>(seed)) : Dropout{};
}

void read(const Operands& operands, RowNorm& a) {
  a.rows = operands.option<int64_t>("rows", 0);
  a.columns = operands.option<int64_t>("columns", 0);
  a.rows_per_group = operands.option<int64_t>("rows_per_group", 1);
  a.input = operands.rows("input");
  a.residual = operands.rows("residual");
  a.gate = operands.rows("gate");
  a.weight = operands.data("weight");
  a.bias = operands.data("bias");
  a.mean = operands.data("mean");
  a.rstd = operands.data("rstd");
  a.dropout = read_dropout(operands);
  a.eps = operands.option<double>("eps", 0);
  a.centered = a.mean != nullptr;
  a.cast_before_weight = operands.option<bool>("cast_before_weight", false);
  a.gate_before_norm = operands.option<bool>("gate_before_norm", false);
  a.pre_activation = operands.option<int>("pre_activation", 0);
  a.activation = operands.option<int>("activation", 0);
}

void row_norm_forward(int kind, py::dict named) {
  const Operands operands(std::move(named));
  RowNormForward a;
  read(operands, a);
  a.output = operands.rows("output");
  a.residual_out = operands.rows("residual_out");
  a.given_statistics = operands.option<bool>("given_statistics", false);
  dispatch_storage(ScalarKind(kind), [&](auto storage) { launch_forward<decltype(storage)>(a, host_launch); });
}

void row_norm_backward(int kind, py::dict named) {
  const Operands operands(std::move(named));
  RowNormBackward a;
  read(operands, a);
  a.grad_output = operands.rows("grad_output");
  a.grad_residual_out = operands.rows("grad_residual_out");
  a.grad_input = operands.rows("grad_input");
  a.grad_residual = operands.rows("grad_residual");
  a.grad_gate = operands.rows("grad_gate");
  a.output = operands.rows("output");
  auto* grad_weight = static_cast<float*>(operands.data("grad_weight"));
  auto* grad_bias = static_cast<float*>(operands.data("grad_bias"));
  const int64_t sums = PartialSums(a.rows, a.rows_per_group).elements(a.columns);
  std::vector<float> weight_sums(sums, NAN), bias_sums(sums, NAN);
  dispatch_storage(ScalarKind(kind), [&](auto storage) {
    launch_backward<decltype(storage)>(a, grad_weight, grad_bias, grad_weight ? weight_sums.data() : nullptr,
                                       grad_bias ? bias_sums.data() : nullptr, host_launch);
  });
}

void read(const Operands& operands, Glu& a) {
  a.rows = operands.option<int64_t>("rows", 0);
  a.columns = operands.option<int64_t>("columns", 0);
  a.step = operands.option<int64_t>("step", 1);
  a.gate = operands.rows("gate");
  a.value = operands.rows("value");
  a.activation = operands.option<int>("activation", 0);
  a.limit = operands.option<double>("limit", INFINITY);
  a.offset = operands.option<double>("offset", 0);
}

void glu_forward(int kind, py::dict named) {
  const Operands operands(std::move(named));
  GluForward a;
  read(operands, a);
  a.output = operands.rows("output");
  dispatch_storage(ScalarKind(kind), [&](auto storage) { launch_glu<decltype(storage)>(a, host_launch); });
}

void glu_backward(int kind, py::dict named) {
  const Operands operands(std::move(named));
  GluBackward a;
  read(operands, a);
  a.grad_output = operands.rows("grad_output");
  a.grad_gate = operands.rows("grad_gate");
  a.grad_value = operands.rows("grad_value");
  a.output = operands.rows("output");
  dispatch_storage(ScalarKind(kind), [&](auto storage) { launch_glu<decltype(storage)>(a, host_launch); });
}

void read(const Operands& operands, BiasAct& a) {
  a.rows = operands.option<int64_t>("rows", 0);
  a.columns = operands.option<int64_t>("columns", 0);
  a.input = operands.rows("input");
  a.bias = operands.data("bias");
  a.activation = operands.option<int>("activation", 0);
  a.dropout = read_dropout(operands);
}

void bias_act_forward(int kind, py::dict named) {
  const Operands operands(std::move(named));
  BiasActForward a;
  read(operands, a);
  a.output = operands.rows("output");
  dispatch_storage(ScalarKind(kind), [&](auto storage) { launch_bias_act<decltype(storage)>(a, host_launch); });
}

void bias_act_backward(int kind, py::dict named) {
  const Operands operands(std::move(named));
  BiasActBackward a;
  read(operands, a);
  a.grad_output = operands.rows("grad_output");
  a.grad_input = operands.rows("grad_input");
  a.output = operands.rows("output");
  auto* grad_bias = static_cast<float*>(operands.data("grad_bias"));
  std::vector<float> sums(PartialSums(a.rows, a.rows).elements(a.columns), NAN);
  dispatch_storage(ScalarKind(kind),
                   [&](auto storage) { launch_bias_act<decltype(storage)>(a, grad_bias, sums.data(), host_launch); });
}

void read(const Operands& operands, Dyt& a) {
  a.rows = operands.option<int64_t>("rows", 0);
  a.columns = operands.option<int64_t>("columns", 0);
  a.input = operands.rows("input");
  a.alpha = operands.data("alpha");
  a.weight = operands.data("weight");
  a.bias = operands.data("bias");
}

void dyt_forward(int kind, py::dict named) {
  const Operands operands(std::move(named));
  DytForward a;
  read(operands, a);
  a.output = operands.rows("output");
  dispatch_storage(ScalarKind(kind), [&](auto storage) { launch_dyt<decltype(storage)>(a, host_launch); });
}

void dyt_backward(int kind, py::dict named) {
  const Operands operands(std::move(named));
  DytBackward a;
  read(operands, a);
  a.grad_output = operands.rows("grad_output");
  a.grad_input = operands.rows("grad_input");
  const auto gradient = [&](const char* name) { return static_cast<float*>(operands.data(name)); };
  const DytSums gradients{gradient("grad_alpha"), gradient("grad_weight"), gradient("grad_bias")};
  std::vector<float> alpha(alpha_sums_of(a), NAN), weight(PartialSums(a.rows, a.rows).elements(a.columns), NAN);
  std::vector<float> bias = weight;
  const DytSums sums{gradients.alpha ? alpha.data() : nullptr, gradients.weight ? weight.data() : nullptr,
                     gradients.bias ? bias.data() : nullptr};
  dispatch_storage(ScalarKind(kind),
                   [&](auto storage) { launch_dyt<decltype(storage)>(a, gradients, sums, host_launch); });
}

Angles read_angles(const Operands& operands, const char* name) {
  Angles angles;
  angles.rows = operands.rows(name);
  angles.kind = ScalarKind(operands.option<int>((std::string(name) + "_kind").c_str(), 0));
  angles.step = operands.option<int64_t>("step", 1);
  angles.shift = operands.option<int64_t>("shift", 0);
  return angles;
}

void read(const Operands& operands, Rotary& a) {
  a.rows = operands.option<int64_t>("rows", 0);
  a.columns = operands.option<int64_t>("columns", 0);
  a.middle = operands.option<int64_t>("middle", 1);
  a.inner = operands.option<int64_t>("inner", 1);
  a.rotary_dim = operands.option<int64_t>("rotary_dim", 0);
  a.start = operands.option<int64_t>("start", 0);
  a.interleaved = operands.option<bool>("interleaved", false);
  a.interleaved_output = operands.option<bool>("interleaved_output", false);
  a.cast_before_weight = operands.option<bool>("cast_before_weight", false);
  a.norm = HeadNorm(operands.option<int>("norm", 0));
  a.eps = operands.option<double>("eps", 0);
  a.input = operands.rows("input");
  a.cos = read_angles(operands, "cos");
  a.sin = read_angles(operands, "sin");
  a.weight = operands.data("weight");
  a.bias = operands.data("bias");
}

void rotary_forward(int kind, py::dict named) {
  const Operands operands(std::move(named));
  RotaryForward a;
  read(operands, a);
  a.output = operands.rows("output");
  dispatch_storage(ScalarKind(kind), [&](auto storage) { launch_rotary<decltype(storage)>(a, host_launch); });
}

void rotary_backward(int kind, py::dict named) {
  const Operands operands(std::move(named));
  RotaryBackward a;
  read(operands, a);
  a.grad_output = operands.rows("grad_output");
  a.grad_input = operands.rows("grad_input");
  auto* grad_weight = static_cast<float*>(operands.data("grad_weight"));
  auto* grad_bias = static_cast<float*>(operands.data("grad_bias"));
  std::vector<HeadStatistics> statistics(a.rows, {NAN, NAN});
  std::vector<float> weight(PartialSums(a.rows, a.rows).elements(a.columns), NAN), bias = weight;
  const RotarySums sums{grad_weight || grad_bias ? statistics.data() : nullptr, grad_weight ? weight.data() : nullptr,
                        grad_bias ? bias.data() : nullptr};
  dispatch_storage(ScalarKind(kind), [&](auto storage) {
    launch_rotary<decltype(storage)>(a, grad_weight, grad_bias, sums, host_launch);
  });
}

void read(const Operands& operands, ChannelNorm& a) {
  a.planes = operands.option<bool>("planes", true);
  a.samples = operands.option<int64_t>("samples", 0);
  a.channels = operands.option<int64_t>("channels", 0);
  a.size = operands.option<int64_t>("size", 0);
  a.input = operands.data("input");
}

void read(const Operands& operands, ChannelReduction& a) {
  read(operands, static_cast<ChannelNorm&>(a));
  a.pieces = operands.option<int64_t>("pieces", 1);
  a.piece_rows = operands.option<int64_t>("piece_rows", 0);
  a.first = operands.data("first");
  a.second = operands.data("second");
}

template <class Block>
void read_activated(const Operands& operands, Block& a) {
  read(operands, a);
  a.coefficients = {operands.data("coefficients"), operands.option<bool>("by_sample", false)};
  a.other = operands.data("other");
  a.activation = operands.option<int>("activation", 0);
}

template <class Block>
void read_gradient(const Operands& operands, Block& a) {
  read_activated(operands, a);
  a.grad_output = operands.data("grad_output");
  a.by_output = operands.option<bool>("by_output", false);
}

void channel_moments(int kind, py::dict named) {
  ChannelMoments a;
  read(Operands(std::move(named)), a);
  dispatch_storage(ScalarKind(kind), [&](auto storage) { launch_channel_norm<decltype(storage)>(a, host_launch); });
}

void channel_forward(int kind, py::dict named) {
  const Operands operands(std::move(named));
  ChannelForward a;
  read_activated(operands, a);
  a.output = operands.data("output");
  dispatch_storage(ScalarKind(kind), [&](auto storage) { launch_channel_norm<decltype(storage)>(a, host_launch); });
}

void channel_sums(int kind, py::dict named) {
  ChannelSums a;
  read_gradient(Operands(std::move(named)), a);
  dispatch_storage(ScalarKind(kind), [&](auto storage) { launch_channel_norm<decltype(storage)>(a, host_launch); });
}

void channel_backward(int kind, py::dict named) {
  const Operands operands(std::move(named));
  ChannelBackward a;
  read_gradient(operands, a);
  a.grad_input = operands.data("grad_input");
  a.grad_residual = operands.data("grad_residual");
  dispatch_storage(ScalarKind(kind), [&](auto storage) { launch_channel_norm<decltype(storage)>(a, host_launch); });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("row_norm_forward", &row_norm_forward);
  m.def("row_norm_backward", &row_norm_backward);
  m.def("glu_forward", &glu_forward);
  m.def("glu_backward", &glu_backward);
  m.def("bias_act_forward", &bias_act_forward);
  m.def("bias_act_backward", &bias_act_backward);
  m.def("dyt_forward", &dyt_forward);
  m.def("dyt_backward", &dyt_backward);
  m.def("rotary_forward", &rotary_forward);
  m.def("rotary_backward", &rotary_backward);
  m.def("channel_moments", &channel_moments);
  m.def("channel_forward", &channel_forward);
  m.def("channel_sums", &channel_sums);
  m.def("channel_backward", &channel_backward);
}
