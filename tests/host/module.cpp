// The CUDA row-norm kernels on the host, for the tests: operands come by name, as (address, row stride).
#include "cuda_on_host.h"

#include <pybind11/pybind11.h>

#include "../../csrc/cuda/row_norm_launch.cuh"

namespace py = pybind11;
using namespace ckpt;

namespace {

class Operands {
 public:
  explicit Operands(py::dict operands) : operands_(std::move(operands)) {}

  Rows rows(const char* name) const {
    if (!has(name)) return {};
    auto [data, stride] = operands_[name].cast<std::pair<uintptr_t, int64_t>>();
    return {reinterpret_cast<void*>(data), stride};
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
  a.seed = static_cast<const int64_t*>(operands.data("seed"));
  a.dropout = Dropout::make(operands.option<double>("dropout_p", 0));
  a.eps = operands.option<double>("eps", 0);
  a.centered = a.mean != nullptr;
  a.cast_before_weight = operands.option<bool>("cast_before_weight", false);
  a.gate_first = operands.option<bool>("gate_first", false);
  a.pre_activation = operands.option<int>("pre_activation", 0);
  a.activation = operands.option<int>("activation", 0);
}

void forward(int kind, py::dict named) {
  const Operands operands(std::move(named));
  RowNormForward a;
  read(operands, a);
  a.output = operands.rows("output");
  a.residual_out = operands.rows("residual_out");
  dispatch_storage(ScalarKind(kind),
                   [&](auto storage) { launch_forward<decltype(storage)>(a, HostLaunch{unsigned(block_threads)}); });
}

void backward(int kind, py::dict named) {
  const Operands operands(std::move(named));
  RowNormBackward a;
  read(operands, a);
  a.grad_output = operands.rows("grad_output");
  a.grad_residual_out = operands.rows("grad_residual_out");
  a.grad_input = operands.rows("grad_input");
  a.grad_residual = operands.rows("grad_residual");
  a.grad_gate = operands.rows("grad_gate");
  auto* grad_weight = static_cast<float*>(operands.data("grad_weight"));
  auto* grad_bias = static_cast<float*>(operands.data("grad_bias"));
  std::vector<float> weight_sums(PartialSums(a).elements(a), NAN), bias_sums(PartialSums(a).elements(a), NAN);
  dispatch_storage(ScalarKind(kind), [&](auto storage) {
    launch_backward<decltype(storage)>(a, grad_weight, grad_bias, grad_weight ? weight_sums.data() : nullptr,
                                       grad_bias ? bias_sums.data() : nullptr, HostLaunch{unsigned(block_threads)});
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("forward", &forward);
  m.def("backward", &backward);
}
