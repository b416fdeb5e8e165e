// The glu ops of one device: their operands read into the plain structs of glu.h, which the device runs.
#pragma once

#include "glu.h"
#include "operands.h"

namespace ckpt {

// Device has a type Tensor, add<&function>(library, name), run_forward(block, tensor, kind) and run_backward(block,
// tensor, kind); the tensor is on its device.
template <class Device>
struct GluOps {
  using Tensor = typename Device::Tensor;
  using OptionalTensor = std::optional<Tensor>;

  using Operands = ckpt::Operands<Tensor>;

  static bool take_turns(const Rows& first, const Rows& second, ScalarKind kind) {
    return static_cast<char*>(second.data) - static_cast<char*>(first.data) == size_of(kind) &&
           first.stride == second.stride;
  }

  static void set_operands(Glu& a, const Operands& operands, const Tensor& gate, const Tensor& value,
                           int64_t activation, double limit, double offset) {
    // Tensors of other dimensions are dense, and are processed as one row.
    a.rows = gate.dim() == 2 ? gate.size(0) : 1;
    a.columns = gate.dim() == 2 ? gate.size(1) : gate.numel();
    a.step = gate.dim() == 2 && a.columns > 1 ? gate.stride(1) : 1;
    a.gate = operands.rows("gate", gate, a.rows, a.columns, a.step);
    a.value = operands.rows("value", value, a.rows, a.columns, a.step);
    STD_TORCH_CHECK(a.step == 1 || (a.step == 2 && take_turns(a.gate, a.value, operands.kind)),
                    "expected gate and value to take turns");
    a.activation = int(activation);
    a.limit = limit;
    a.offset = offset;
  }

  static void forward(Tensor gate, Tensor value, Tensor output, int64_t activation, double limit, double offset) {
    const Operands operands("gate", gate);
    GluForward a;
    set_operands(a, operands, gate, value, activation, limit, offset);
    a.output = operands.rows("output", output, a.rows, a.columns);
    Device::run_forward(a, gate, operands.kind);
  }

  static void backward(Tensor grad_output, Tensor gate, Tensor value, OptionalTensor grad_gate,
                       OptionalTensor grad_value, OptionalTensor output, int64_t activation, double limit,
                       double offset) {
    const Operands operands("gate", gate);
    GluBackward a;
    set_operands(a, operands, gate, value, activation, limit, offset);
    a.grad_output = operands.rows("grad_output", grad_output, a.rows, a.columns);
    a.grad_gate = operands.rows("grad_gate", grad_gate, a.rows, a.columns, a.step);
    a.grad_value = operands.rows("grad_value", grad_value, a.rows, a.columns, a.step);
    a.output = operands.rows("output", output, a.rows, a.columns);
    STD_TORCH_CHECK(a.step == 1 || take_turns(a.grad_gate, a.grad_value, operands.kind),
                    "expected gradients that take turns as gate and value do");
    Device::run_backward(a, gate, operands.kind);
  }

  template <class Library>
  static void add_to(Library& m) {
    Device::template add<&forward>(m, "glu_forward");
    Device::template add<&backward>(m, "glu_backward");
  }
};

}  // namespace ckpt
