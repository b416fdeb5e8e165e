// The DyT ops of one device: convert tensors to the plain structs of dyt.h, and call the device's loops.
#pragma once

#include "dyt.h"
#include "operands.h"

namespace ckpt {

// Device has a type Tensor, add<&function>(library, name), Coefficient (see row_norm_ops.h), run_forward(block, tensor,
// kind) and run_backward(block, tensor, kind, grad_alpha, grad_weight, grad_bias), where `tensor` determines the
// device.
template <class Device>
struct DytOps {
  using Tensor = typename Device::Tensor;
  using OptionalTensor = std::optional<Tensor>;
  using Coefficient = typename Device::Coefficient;

  using Operands = ckpt::Operands<Tensor>;

  static void set_operands(Dyt& a, const Operands& operands, const Tensor& input, const Tensor& alpha) {
    STD_TORCH_CHECK(input.dim() > 0, "expected rows");
    STD_TORCH_CHECK(alpha.numel() == 1, "alpha has not one element");
    a.columns = input.size(input.dim() - 1);
    a.rows = a.columns ? input.numel() / a.columns : 0;
    a.input = operands.rows("input", input, a.rows, a.columns);
  }

  static void forward(Tensor input, Tensor alpha, OptionalTensor weight, OptionalTensor bias, Tensor output) {
    const Operands operands("input", input);
    const Coefficient scale(operands, "alpha", alpha, 0), w(operands, "weight", weight, 0);
    const Coefficient b(operands, "bias", bias, 0);
    DytForward a;
    set_operands(a, operands, input, alpha);
    a.alpha = scale.data();
    a.weight = for_columns(w, "weight", weight, a.columns);
    a.bias = for_columns(b, "bias", bias, a.columns);
    a.output = operands.rows("output", output, a.rows, a.columns);
    Device::run_forward(a, input, operands.kind);
  }

  static void backward(Tensor grad_output, Tensor input, Tensor alpha, OptionalTensor weight, OptionalTensor grad_input,
                       OptionalTensor grad_alpha, OptionalTensor grad_weight, OptionalTensor grad_bias) {
    const Operands operands("input", input);
    const Coefficient scale(operands, "alpha", alpha, 0), w(operands, "weight", weight, 0);
    DytBackward a;
    set_operands(a, operands, input, alpha);
    a.alpha = scale.data();
    a.weight = for_columns(w, "weight", weight, a.columns);
    a.grad_output = operands.rows("grad_output", grad_output, a.rows, a.columns);
    a.grad_input = operands.rows("grad_input", grad_input, a.rows, a.columns);
    Device::run_backward(a, input, operands.kind, operands.numbers("grad_alpha", grad_alpha, 1),
                         operands.numbers("grad_weight", grad_weight, a.columns),
                         operands.numbers("grad_bias", grad_bias, a.columns));
  }

  template <class Library>
  static void add_to(Library& m) {
    Device::template add<&forward>(m, "dyt_forward");
    Device::template add<&backward>(m, "dyt_backward");
  }
};

}  // namespace ckpt
