// The bias_act ops of one device: convert tensors to the plain structs of bias_act.h, and call the device's loops.
#pragma once

#include "bias_act.h"
#include "operands.h"

namespace ckpt {

// Device has a type Tensor, add<&function>(library, name), Coefficient (see row_norm_ops.h), run_forward(block, tensor,
// kind) and run_backward(block, tensor, kind, grad_bias), where `tensor` determines the device.
template <class Device>
struct BiasActOps {
  using Tensor = typename Device::Tensor;
  using OptionalTensor = std::optional<Tensor>;

  using Operands = ckpt::Operands<Tensor>;

  static void set_operands(BiasAct& a, const Operands& operands, const Tensor& input, const OptionalTensor& seed,
                           int64_t activation, double dropout_p) {
    STD_TORCH_CHECK(input.dim() > 0, "expected rows");
    a.columns = input.size(input.dim() - 1);
    a.rows = a.columns ? input.numel() / a.columns : 0;
    a.input = operands.rows("input", input, a.rows, a.columns);
    a.activation = int(activation);
    a.dropout = operands.dropout("seed", seed, dropout_p);
  }

  static const void* checked(const typename Device::Coefficient& coefficient, const OptionalTensor& bias,
                             int64_t columns) {
    STD_TORCH_CHECK(!bias || bias->numel() == columns, "bias has not an element for every column");
    return coefficient.data();
  }

  static void forward(Tensor input, OptionalTensor bias, OptionalTensor seed, Tensor output, int64_t activation,
                      double dropout_p) {
    const Operands operands("input", input);
    typename Device::Coefficient b(operands, "bias", bias, 0);
    BiasActForward a;
    set_operands(a, operands, input, seed, activation, dropout_p);
    a.bias = checked(b, bias, a.columns);
    a.output = operands.rows("output", output, a.rows, a.columns);
    Device::run_forward(a, input, operands.kind);
  }

  static void backward(Tensor grad_output, Tensor input, OptionalTensor bias, OptionalTensor seed,
                       OptionalTensor grad_input, OptionalTensor grad_bias, OptionalTensor output, int64_t activation,
                       double dropout_p) {
    const Operands operands("input", input);
    typename Device::Coefficient b(operands, "bias", bias, 0);
    BiasActBackward a;
    set_operands(a, operands, input, seed, activation, dropout_p);
    a.bias = checked(b, bias, a.columns);
    a.grad_output = operands.rows("grad_output", grad_output, a.rows, a.columns);
    a.grad_input = operands.rows("grad_input", grad_input, a.rows, a.columns);
    a.output = operands.rows("output", output, a.rows, a.columns);
    Device::run_backward(a, input, operands.kind, operands.numbers("grad_bias", grad_bias, a.columns));
  }

  template <class Library>
  static void add_to(Library& m) {
    Device::template add<&forward>(m, "bias_act_forward");
    Device::template add<&backward>(m, "bias_act_backward");
  }
};

}  // namespace ckpt
