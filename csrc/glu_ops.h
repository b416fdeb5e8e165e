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

  static void set_operands(Glu& a, const Tensor& gate, const Tensor& value, int64_t activation) {
    // What has another shape is in one piece, and one row.
    a.rows = gate.dim() == 2 ? gate.size(0) : 1;
    a.columns = gate.dim() == 2 ? gate.size(1) : gate.numel();
    a.step = gate.dim() == 2 && a.columns > 1 ? gate.stride(1) : 1;
    if (a.step != 1) {
      const int64_t element = static_cast<char*>(value.data_ptr()) - static_cast<char*>(gate.data_ptr());
      STD_TORCH_CHECK(a.step == 2 && element == size_of(kind_of(gate)), "expected gate and value to take turns");
    }
    a.gate = a.step == 1 ? rows_of(gate, a.rows, a.columns) : rows_of(gate, a.rows, a.columns, a.step);
    a.value = a.step == 1 ? rows_of(value, a.rows, a.columns) : rows_of(value, a.rows, a.columns, a.step);
    a.activation = int(activation);
  }

  static void forward(Tensor gate, Tensor value, Tensor output, int64_t activation) {
    GluForward a;
    set_operands(a, gate, value, activation);
    a.output = rows_of(output, a.rows, a.columns);
    Device::run_forward(a, gate, kind_of(gate));
  }

  static void backward(Tensor grad_output, Tensor gate, Tensor value, OptionalTensor grad_gate,
                       OptionalTensor grad_value, OptionalTensor output, int64_t activation) {
    GluBackward a;
    set_operands(a, gate, value, activation);
    a.grad_output = rows_of(grad_output, a.rows, a.columns);
    a.grad_gate = a.step == 1 ? rows_of(grad_gate, a.rows, a.columns) : rows_of(grad_gate, a.rows, a.columns, a.step);
    a.grad_value =
        a.step == 1 ? rows_of(grad_value, a.rows, a.columns) : rows_of(grad_value, a.rows, a.columns, a.step);
    a.output = rows_of(output, a.rows, a.columns);
    STD_TORCH_CHECK(a.step == 1 || (a.grad_gate && a.grad_value), "expected both gradients where the two take turns");
    Device::run_backward(a, gate, kind_of(gate));
  }

  template <class Library>
  static void add_to(Library& m) {
    Device::template add<&forward>(m, "glu_forward");
    Device::template add<&backward>(m, "glu_backward");
  }
};

}  // namespace ckpt
