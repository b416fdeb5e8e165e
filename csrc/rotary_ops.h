// The rotary ops of one device: convert tensors to the plain structs of rotary.h, and call the device's loops.
#pragma once

#include "operands.h"
#include "rotary.h"

namespace ckpt {

// Device has a type Tensor, add<&function>(library, name), Coefficient (see row_norm_ops.h), and
//   Table(angles, block, kind).angles(): the table in the form that the kernels read, for heads of that storage type;
//   run_forward(block, tensor, kind), run_backward(block, tensor, kind, grad_weight, grad_bias), where `tensor`
//   determines the device.
template <class Device>
struct RotaryOps {
  using Tensor = typename Device::Tensor;
  using OptionalTensor = std::optional<Tensor>;
  using Coefficient = typename Device::Coefficient;
  using Table = typename Device::Table;

  using Operands = ckpt::Operands<Tensor>;

  // Sets all fields that are no pointers, from one tensor of heads.
  static void set_numbers(Rotary& a, const Tensor& heads, int64_t rotary_dim, int64_t start, bool interleaved,
                          bool interleaved_output, int64_t norm, double eps, bool cast_before_weight) {
    STD_TORCH_CHECK(heads.dim() == 4 && heads.numel() > 0, "expected rows of heads on three levels");
    a.columns = heads.size(3);
    a.rows = heads.numel() / a.columns;
    a.middle = heads.size(1);
    a.inner = heads.size(2);
    STD_TORCH_CHECK(rotary_dim >= 0 && rotary_dim % 2 == 0 && start >= 0 && start + rotary_dim <= a.columns,
                    "expected pairs within the columns");
    STD_TORCH_CHECK(norm >= 0 && norm <= int64_t(HeadNorm::layer), "expected a norm of 0 to 2");
    a.rotary_dim = rotary_dim;
    a.start = start;
    a.interleaved = interleaved;
    a.interleaved_output = interleaved_output;
    a.norm = HeadNorm(norm);
    a.eps = eps;
    a.cast_before_weight = cast_before_weight;
  }

  static bool has_levels(const Rotary& a, const Tensor& t) {
    return t.dim() == 4 && t.size(0) == a.rows / (a.middle * a.inner) && t.size(1) == a.middle && t.size(2) == a.inner;
  }

  static Rows heads(const Operands& operands, const char* name, const OptionalTensor& t, const Rotary& a) {
    const Rows rows = operands.rows_as_they_lie(name, t, a.rows, a.columns);
    STD_TORCH_CHECK(!t || has_levels(a, *t), name, " is no head for each row on its three levels");
    return rows;
  }

  // A table of any dtype, without conversion.
  static Angles angles(const Operands& operands, const char* name, const Tensor& t, const Rotary& a) {
    Angles found;
    found.kind = kind_of(name, t);
    found.rows.data = operands.address(name, t, int64_t(found.kind));
    const int64_t levels[] = {a.rows / (a.middle * a.inner), a.middle, a.inner};
    bool fits = t.dim() == 4 && (t.size(3) == a.rotary_dim || t.size(3) == a.pairs());
    fits = fits && (t.size(3) <= 1 || t.stride(3) == 1);
    for (int64_t dim = 0; fits && dim < 3; ++dim) fits = t.size(dim) == 1 || t.size(dim) == levels[dim];
    STD_TORCH_CHECK(fits, name, " is no table of angles for all heads: expected one of ", a.rotary_dim, " or ",
                    a.pairs(), " entries in one piece, and 1 or the heads' size on each level");
    const auto stride = [&](int64_t dim) { return t.size(dim) == 1 || a.rotary_dim == 0 ? 0 : t.stride(dim); };
    found.rows.stride = stride(0);
    found.rows.middle_stride = stride(1);
    found.rows.inner_stride = stride(2);
    if (t.size(3) == a.rotary_dim && a.rotary_dim > 0) {
      found.step = a.interleaved_output ? 2 : 1;
      found.shift = a.interleaved_output ? 1 : a.pairs();
    }
    return found;
  }

  static void forward(Tensor input, Tensor cos, Tensor sin, OptionalTensor weight, OptionalTensor bias, Tensor output,
                      int64_t rotary_dim, int64_t start, bool interleaved, bool interleaved_output, int64_t norm,
                      double eps, double weight_offset, bool cast_before_weight) {
    const Operands operands("input", input);
    RotaryForward a;
    set_numbers(a, input, rotary_dim, start, interleaved, interleaved_output, norm, eps, cast_before_weight);
    a.input = heads(operands, "input", input, a);
    a.output = heads(operands, "output", output, a);
    const Table cosines(angles(operands, "cos", cos, a), a, operands.kind);
    const Table sines(angles(operands, "sin", sin, a), a, operands.kind);
    const Coefficient w(operands, "weight", weight, weight_offset), b(operands, "bias", bias, 0);
    a.cos = cosines.angles();
    a.sin = sines.angles();
    a.weight = for_columns(w, "weight", weight, a.columns);
    a.bias = for_columns(b, "bias", bias, a.columns);
    Device::run_forward(a, input, operands.kind);
  }

  // With a norm, `input` has a value.
  static void backward(Tensor grad_output, OptionalTensor input, Tensor cos, Tensor sin, OptionalTensor weight,
                       OptionalTensor grad_input, OptionalTensor grad_weight, OptionalTensor grad_bias,
                       int64_t rotary_dim, int64_t start, bool interleaved, bool interleaved_output, int64_t norm,
                       double eps, double weight_offset, bool cast_before_weight) {
    const Operands operands("grad_output", grad_output);
    RotaryBackward a;
    set_numbers(a, grad_output, rotary_dim, start, interleaved, interleaved_output, norm, eps, cast_before_weight);
    STD_TORCH_CHECK((a.norm != HeadNorm::none) == input.has_value(), "expected an input with a norm and none without");
    STD_TORCH_CHECK(input || (!grad_weight && !grad_bias), "expected no gradients of a norm without one");
    a.grad_output = heads(operands, "grad_output", grad_output, a);
    a.input = heads(operands, "input", input, a);
    a.grad_input = heads(operands, "grad_input", grad_input, a);
    const Table cosines(angles(operands, "cos", cos, a), a, operands.kind);
    const Table sines(angles(operands, "sin", sin, a), a, operands.kind);
    const Coefficient w(operands, "weight", weight, weight_offset);
    a.cos = cosines.angles();
    a.sin = sines.angles();
    a.weight = for_columns(w, "weight", weight, a.columns);
    void* weight_sum = operands.numbers("grad_weight", grad_weight, a.columns);
    void* bias_sum = operands.numbers("grad_bias", grad_bias, a.columns);
    if (a.grad_input || weight_sum || bias_sum)
      Device::run_backward(a, grad_output, operands.kind, weight_sum, bias_sum);
  }

  template <class Library>
  static void add_to(Library& m) {
    Device::template add<&forward>(m, "rotary_forward");
    Device::template add<&backward>(m, "rotary_backward");
  }
};

}  // namespace ckpt
