// The row-norm ops of one device: convert tensors to the plain structs of row_norm.h, and call the device's loops.
//
// Device has a type Tensor, add<&function>(library, name), and
//   Coefficient(operands, name, tensor, offset).data(): a weight or bias in the compute type, with the offset added;
//   run_forward(block, input, kind), run_backward(block, grad_output, kind, grad_weight, grad_bias), where the tensor
//   determines the device.
#pragma once

#include "operands.h"
#include "row_norm.h"

namespace ckpt {

// The operands that a block has in both passes. The object owns the coefficients in the compute type.
template <class Device>
struct RowNormOperands : Operands<typename Device::Tensor> {
  using Tensor = typename Device::Tensor;
  using OptionalTensor = std::optional<Tensor>;

  typename Device::Coefficient weight, bias;

  RowNormOperands(RowNorm& a, const Tensor& input, const OptionalTensor& gate, const OptionalTensor& weight,
                  const OptionalTensor& bias, const OptionalTensor& seed, const OptionalTensor& mean,
                  const Tensor& rstd, double weight_offset, double dropout_p)
      : Operands<Tensor>("input", input), weight(*this, "weight", weight, weight_offset), bias(*this, "bias", bias, 0) {
    STD_TORCH_CHECK(input.dim() > 0 && input.numel() > 0, "input has no rows");
    a.columns = input.size(input.dim() - 1);
    a.rows = input.numel() / a.columns;
    a.input = this->rows_as_they_lie("input", input, a.rows, a.columns);
    a.gate = this->rows_as_they_lie("gate", gate, a.rows, a.columns);
    a.mean = this->numbers("mean", mean, a.rows);
    a.rstd = this->numbers("rstd", rstd, a.rows);
    a.centered = mean.has_value();
    const int64_t groups = weight ? weight->numel() / a.columns : bias ? bias->numel() / a.columns : 1;
    STD_TORCH_CHECK(groups > 0 && a.rows % groups == 0, "expected weight and bias to divide the rows evenly");
    STD_TORCH_CHECK(!weight || weight->numel() == groups * a.columns, "weight has not an element for every column");
    STD_TORCH_CHECK(!bias || bias->numel() == groups * a.columns, "bias has not an element for every column");
    a.rows_per_group = a.rows / groups;
    a.weight = this->weight.data();
    a.bias = this->bias.data();
    a.dropout = this->dropout("seed", seed, dropout_p);
  }
};

template <class Device>
struct RowNormOps {
  using Tensor = typename Device::Tensor;
  using OptionalTensor = std::optional<Tensor>;

  static void row_norm_forward(Tensor input, OptionalTensor residual, OptionalTensor gate, OptionalTensor weight,
                               OptionalTensor bias, OptionalTensor seed, OptionalTensor mean, Tensor rstd,
                               Tensor output, OptionalTensor residual_out, double eps, int64_t pre_activation,
                               int64_t activation, double weight_offset, bool cast_before_weight, double dropout_p,
                               bool gate_before_norm, bool given_statistics) {
    RowNormForward a;
    const RowNormOperands<Device> operands(a, input, gate, weight, bias, seed, mean, rstd, weight_offset, dropout_p);
    STD_TORCH_CHECK(bool(residual) == bool(residual_out), "expected both a residual and residual_out, or neither");
    a.residual = operands.rows_as_they_lie("residual", residual, a.rows, a.columns);
    a.output = operands.rows("output", output, a.rows, a.columns);
    a.residual_out = operands.rows("residual_out", residual_out, a.rows, a.columns);
    a.eps = eps;
    a.pre_activation = int(pre_activation);
    a.activation = int(activation);
    a.cast_before_weight = cast_before_weight;
    a.gate_before_norm = gate_before_norm;
    a.given_statistics = given_statistics;
    Device::run_forward(a, input, operands.kind);
  }

  // In a block with a residual, `input` is the sum that the forward pass stored. grad_residual is requested only with
  // dropout; otherwise the gradient equals grad_input.
  static void row_norm_backward(Tensor grad_output, OptionalTensor grad_residual_out, Tensor input, OptionalTensor gate,
                                OptionalTensor weight, OptionalTensor bias, OptionalTensor seed, OptionalTensor mean,
                                Tensor rstd, OptionalTensor grad_input, OptionalTensor grad_residual,
                                OptionalTensor grad_gate, OptionalTensor grad_weight, OptionalTensor grad_bias,
                                OptionalTensor output, int64_t pre_activation, int64_t activation, double weight_offset,
                                bool cast_before_weight, double dropout_p, bool gate_before_norm) {
    RowNormBackward a;
    const RowNormOperands<Device> operands(a, input, gate, weight, bias, seed, mean, rstd, weight_offset, dropout_p);
    const int64_t coefficients = a.rows / a.rows_per_group * a.columns;
    a.grad_output = operands.rows_as_they_lie("grad_output", grad_output, a.rows, a.columns);
    a.grad_residual_out = operands.rows_as_they_lie("grad_residual_out", grad_residual_out, a.rows, a.columns);
    a.grad_input = operands.rows("grad_input", grad_input, a.rows, a.columns);
    a.grad_residual = operands.rows("grad_residual", grad_residual, a.rows, a.columns);
    a.grad_gate = operands.rows("grad_gate", grad_gate, a.rows, a.columns);
    a.output = operands.rows("output", output, a.rows, a.columns);
    a.pre_activation = int(pre_activation);
    a.activation = int(activation);
    a.cast_before_weight = cast_before_weight;
    a.gate_before_norm = gate_before_norm;
    STD_TORCH_CHECK(!a.gate_before_norm || bool(a.grad_input) == bool(a.grad_gate),
                    "expected both gradients or neither where the gate comes before the norm");
    Device::run_backward(a, grad_output, operands.kind, operands.numbers("grad_weight", grad_weight, coefficients),
                         operands.numbers("grad_bias", grad_bias, coefficients));
  }

  template <class Library>
  static void add_to(Library& m) {
    Device::template add<&row_norm_forward>(m, "row_norm_forward");
    Device::template add<&row_norm_backward>(m, "row_norm_backward");
  }
};

}  // namespace ckpt
