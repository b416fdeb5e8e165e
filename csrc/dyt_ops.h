// The DyT ops of one device: their operands read into the plain structs of dyt.h, which the device runs.
#pragma once

#include "dyt.h"
#include "operands.h"

namespace ckpt {

// Device has a type Tensor, add<&function>(library, name), Coefficient, as for the row norms, run_forward(block,
// tensor, kind) and run_backward(block, tensor, kind, grad_alpha, grad_weight, grad_bias); the tensor is on its device.
template <class Device>
struct DytOps {
  using Tensor = typename Device::Tensor;
  using OptionalTensor = std::optional<Tensor>;
  using Coefficient = typename Device::Coefficient;

  static void set_operands(Dyt& a, const Tensor& input, const Tensor& alpha) {
    STD_TORCH_CHECK(input.dim() > 0, "expected rows");
    STD_TORCH_CHECK(alpha.numel() == 1, "expected an alpha of one element");
    a.columns = input.size(input.dim() - 1);
    a.rows = a.columns ? input.numel() / a.columns : 0;
    a.input = rows_of(input, a.rows, a.columns);
  }

  static const void* checked(const Coefficient& coefficient, const OptionalTensor& tensor, int64_t columns) {
    STD_TORCH_CHECK(!tensor || tensor->numel() == columns, "expected a weight and a bias for every column");
    return coefficient.data();
  }

  static void forward(Tensor input, Tensor alpha, OptionalTensor weight, OptionalTensor bias, Tensor output) {
    const ScalarKind kind = kind_of(input);
    const Coefficient scale(alpha, kind, 0), w(weight, kind, 0), b(bias, kind, 0);
    DytForward a;
    set_operands(a, input, alpha);
    a.alpha = scale.data();
    a.weight = checked(w, weight, a.columns);
    a.bias = checked(b, bias, a.columns);
    a.output = rows_of(output, a.rows, a.columns);
    Device::run_forward(a, input, kind);
  }

  static void backward(Tensor grad_output, Tensor input, Tensor alpha, OptionalTensor weight, OptionalTensor grad_input,
                       OptionalTensor grad_alpha, OptionalTensor grad_weight, OptionalTensor grad_bias) {
    const ScalarKind kind = kind_of(input);
    const Coefficient scale(alpha, kind, 0), w(weight, kind, 0);
    DytBackward a;
    set_operands(a, input, alpha);
    a.alpha = scale.data();
    a.weight = checked(w, weight, a.columns);
    a.grad_output = rows_of(grad_output, a.rows, a.columns);
    a.grad_input = rows_of(grad_input, a.rows, a.columns);
    Device::run_backward(a, input, kind, data_of(grad_alpha, 1), data_of(grad_weight, a.columns),
                         data_of(grad_bias, a.columns));
  }

  template <class Library>
  static void add_to(Library& m) {
    Device::template add<&forward>(m, "dyt_forward");
    Device::template add<&backward>(m, "dyt_backward");
  }
};

}  // namespace ckpt
