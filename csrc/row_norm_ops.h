// The row-norm ops of one device: their operands read into the plain structs of row_norm.h, which the device runs.
//
// Device has a type Tensor, add<&function>(library, name), and
//   Coefficient(tensor, kind, offset).data(): a weight or bias in the compute type, with the offset added;
//   run_forward(block, input, kind), run_backward(block, grad_output, kind, grad_weight, grad_bias), which take a
//   tensor for the device they are on.
#pragma once

#include "operands.h"
#include "row_norm.h"

namespace ckpt {

// The operands that every block of the family has.
template <class T>
void set_common(RowNorm& a, const T& input, const std::optional<T>& weight, const std::optional<T>& bias,
                const std::optional<T>& mean, const T& rstd) {
  a.columns = input.size(input.dim() - 1);
  a.rows = input.numel() / a.columns;
  a.input = rows_as_they_lie(input, a.rows, a.columns);
  a.mean = data_of(mean, a.rows);
  a.rstd = data_of(rstd, a.rows);
  a.centered = mean.has_value();
  const int64_t groups = weight ? weight->numel() / a.columns : bias ? bias->numel() / a.columns : 1;
  STD_TORCH_CHECK(groups > 0 && a.rows % groups == 0, "expected weight and bias to divide the rows evenly");
  STD_TORCH_CHECK(!weight || weight->numel() == groups * a.columns, "expected a weight for every column");
  STD_TORCH_CHECK(!bias || bias->numel() == groups * a.columns, "expected a bias for every column");
  a.rows_per_group = a.rows / groups;
}

template <class Device>
struct RowNormOps {
  using Tensor = typename Device::Tensor;
  using OptionalTensor = std::optional<Tensor>;

  static void row_norm_forward(Tensor input, OptionalTensor weight, OptionalTensor bias, Tensor output,
                               OptionalTensor mean, Tensor rstd, double eps, int64_t pre_activation, int64_t activation,
                               double weight_offset, bool cast_before_weight, bool given_statistics) {
    const ScalarKind kind = kind_of(input);
    typename Device::Coefficient w(weight, kind, weight_offset), b(bias, kind, 0);
    RowNormForward a;
    set_common(a, input, weight, bias, mean, rstd);
    a.weight = w.data();
    a.bias = b.data();
    a.output = rows_of(output, a.rows, a.columns);
    a.eps = eps;
    a.pre_activation = int(pre_activation);
    a.activation = int(activation);
    a.cast_before_weight = cast_before_weight;
    a.given_statistics = given_statistics;
    Device::run_forward(a, input, kind);
  }

  static void row_norm_backward(Tensor grad_output, Tensor input, OptionalTensor weight, OptionalTensor bias,
                                OptionalTensor mean, Tensor rstd, OptionalTensor grad_input, OptionalTensor grad_weight,
                                OptionalTensor grad_bias, OptionalTensor output, double /*eps*/, int64_t pre_activation,
                                int64_t activation, double weight_offset, bool cast_before_weight) {
    const ScalarKind kind = kind_of(input);
    typename Device::Coefficient w(weight, kind, weight_offset), b(bias, kind, 0);
    RowNormBackward a;
    set_common(a, input, weight, bias, mean, rstd);
    const int64_t coefficients = a.rows / a.rows_per_group * a.columns;
    a.weight = w.data();
    a.bias = b.data();
    a.grad_output = rows_as_they_lie(grad_output, a.rows, a.columns);
    a.grad_input = rows_of(grad_input, a.rows, a.columns);
    a.output = rows_of(output, a.rows, a.columns);
    a.pre_activation = int(pre_activation);
    a.activation = int(activation);
    a.cast_before_weight = cast_before_weight;
    Device::run_backward(a, grad_output, kind, data_of(grad_weight, coefficients), data_of(grad_bias, coefficients));
  }

  static void add_row_norm_forward(Tensor input, Tensor residual, OptionalTensor weight, OptionalTensor bias,
                                   OptionalTensor seed, Tensor output, Tensor residual_out, OptionalTensor mean,
                                   Tensor rstd, double eps, int64_t activation, double weight_offset,
                                   bool cast_before_weight, double dropout_p) {
    const ScalarKind kind = kind_of(input);
    typename Device::Coefficient w(weight, kind, weight_offset), b(bias, kind, 0);
    RowNormForward a;
    set_common(a, input, weight, bias, mean, rstd);
    a.dropout = dropout_of(seed, dropout_p);
    a.weight = w.data();
    a.bias = b.data();
    a.residual = rows_as_they_lie(residual, a.rows, a.columns);
    a.output = rows_of(output, a.rows, a.columns);
    a.residual_out = rows_of(residual_out, a.rows, a.columns);
    a.eps = eps;
    a.activation = int(activation);
    a.cast_before_weight = cast_before_weight;
    Device::run_forward(a, input, kind);
  }

  // `residual_out` is the forward pass's sum; grad_residual is asked for only where it differs from grad_input,
  // which is where there is dropout.
  static void add_row_norm_backward(Tensor grad_output, OptionalTensor grad_residual_out, Tensor residual_out,
                                    OptionalTensor weight, OptionalTensor bias, OptionalTensor seed,
                                    OptionalTensor mean, Tensor rstd, OptionalTensor grad_input,
                                    OptionalTensor grad_residual, OptionalTensor grad_weight, OptionalTensor grad_bias,
                                    double /*eps*/, int64_t activation, double weight_offset, bool cast_before_weight,
                                    double dropout_p) {
    const ScalarKind kind = kind_of(residual_out);
    typename Device::Coefficient w(weight, kind, weight_offset), b(bias, kind, 0);
    RowNormBackward a;
    set_common(a, residual_out, weight, bias, mean, rstd);
    a.dropout = dropout_of(seed, dropout_p);
    const int64_t coefficients = a.rows / a.rows_per_group * a.columns;
    a.weight = w.data();
    a.bias = b.data();
    a.grad_output = rows_as_they_lie(grad_output, a.rows, a.columns);
    a.grad_residual_out = rows_as_they_lie(grad_residual_out, a.rows, a.columns);
    a.grad_input = rows_of(grad_input, a.rows, a.columns);
    a.grad_residual = rows_of(grad_residual, a.rows, a.columns);
    a.activation = int(activation);
    a.cast_before_weight = cast_before_weight;
    Device::run_backward(a, grad_output, kind, data_of(grad_weight, coefficients), data_of(grad_bias, coefficients));
  }

  static void gated_row_norm_forward(Tensor input, Tensor gate, OptionalTensor weight, Tensor output, Tensor rstd,
                                     double eps, int64_t activation, bool norm_before_gate) {
    const ScalarKind kind = kind_of(input);
    typename Device::Coefficient w(weight, kind, 0);
    RowNormForward a;
    set_common(a, input, weight, OptionalTensor(), OptionalTensor(), rstd);
    a.weight = w.data();
    a.gate = rows_as_they_lie(gate, a.rows, a.columns);
    a.output = rows_of(output, a.rows, a.columns);
    a.eps = eps;
    a.activation = int(activation);
    a.gate_first = !norm_before_gate;
    Device::run_forward(a, input, kind);
  }

  static void gated_row_norm_backward(Tensor grad_output, Tensor input, Tensor gate, OptionalTensor weight, Tensor rstd,
                                      OptionalTensor grad_input, OptionalTensor grad_gate, OptionalTensor grad_weight,
                                      double /*eps*/, int64_t activation, bool norm_before_gate) {
    const ScalarKind kind = kind_of(input);
    typename Device::Coefficient w(weight, kind, 0);
    RowNormBackward a;
    set_common(a, input, weight, OptionalTensor(), OptionalTensor(), rstd);
    a.weight = w.data();
    a.gate = rows_as_they_lie(gate, a.rows, a.columns);
    a.grad_output = rows_as_they_lie(grad_output, a.rows, a.columns);
    a.grad_input = rows_of(grad_input, a.rows, a.columns);
    a.grad_gate = rows_of(grad_gate, a.rows, a.columns);
    a.activation = int(activation);
    a.gate_first = !norm_before_gate;
    STD_TORCH_CHECK(!a.gate_first || bool(a.grad_input) == bool(a.grad_gate),
                    "expected both gradients or neither where the gate comes before the norm");
    Device::run_backward(a, grad_output, kind, data_of(grad_weight, a.columns), nullptr);
  }

  template <class Library>
  static void add_to(Library& m) {
    Device::template add<&row_norm_forward>(m, "row_norm_forward");
    Device::template add<&row_norm_backward>(m, "row_norm_backward");
    Device::template add<&add_row_norm_forward>(m, "add_row_norm_forward");
    Device::template add<&add_row_norm_backward>(m, "add_row_norm_backward");
    Device::template add<&gated_row_norm_forward>(m, "gated_row_norm_forward");
    Device::template add<&gated_row_norm_backward>(m, "gated_row_norm_backward");
  }
};

}  // namespace ckpt
