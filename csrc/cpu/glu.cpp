// The glu ops on the CPU: shares rows, and pieces of long ones, out to threads.
#include "../glu_ops.h"

#include <string.h>

#include "device.h"
#include "row_tasks.h"

namespace ckpt {
namespace {

// Whether the rows of gate and value follow each other without gaps.
bool is_dense(const Glu& a) {
  return is_one_piece(a.gate, a.step * a.columns) && is_one_piece(a.value, a.step * a.columns);
}

struct Cpu : CpuDevice {
  static void run_forward(const GluForward& a, const View& gate, ScalarKind kind) {
    if (a.rows > 1 && is_dense(a) && is_one_piece(a.output, a.columns)) return run_forward(as_one_row(a), gate, kind);
    const GluLoops& loops = glu_loops(kind);
    for_pieces(a.rows, a.columns, [&](const Part& part) { loops.forward(a, part); });
  }
  static void run_backward(const GluBackward& a, const View& gate, ScalarKind kind) {
    if (a.rows > 1 && is_dense(a) && is_one_piece(a.grad_output, a.columns) && is_one_piece(a.output, a.columns) &&
        is_one_piece(a.grad_gate, a.step * a.columns) && is_one_piece(a.grad_value, a.step * a.columns))
      return run_backward(as_one_row(a), gate, kind);
    const GluLoops& loops = glu_loops(kind);
    for_pieces(a.rows, a.columns, [&](const Part& part) { loops.backward(a, part); });
  }
};

// Of one tensor in one piece, whose rows pack gate and value in one of the orders of `ops.glu.LAYOUTS`. Only called
// directly: through the dispatcher go views of both.
enum Layout { gate_first, value_first, interleaved };

void set_packed(Glu& a, const Operands<View>& operands, const char* name, const View& packed, int64_t layout,
                Rows& gate, Rows& value) {
  STD_TORCH_CHECK(packed.dim() > 0 && packed.size(packed.dim() - 1) % 2 == 0, name, " has not rows of two halves");
  a.columns = packed.size(packed.dim() - 1) / 2;
  a.rows = a.columns ? packed.numel() / (2 * a.columns) : 0;
  a.step = layout == interleaved && a.columns > 1 ? 2 : 1;
  char* data = static_cast<char*>(operands.elements(name, packed, 2 * a.rows * a.columns));
  const int64_t half = size_of(operands.kind) * (layout == interleaved ? 1 : a.columns);
  gate = {layout == value_first ? data + half : data, 2 * a.columns};
  value = {layout == value_first ? data : data + half, 2 * a.columns};
}

void packed_glu_forward(View packed, View output, int64_t activation, int64_t layout, double limit, double offset) {
  const Operands<View> operands("packed", packed);
  GluForward a;
  set_packed(a, operands, "packed", packed, layout, a.gate, a.value);
  a.activation = int(activation);
  a.limit = limit;
  a.offset = offset;
  a.output = operands.rows("output", output, a.rows, a.columns);
  Cpu::run_forward(a, packed, operands.kind);
}

void packed_glu_backward(View grad_output, View packed, View grad_packed, int64_t activation, int64_t layout,
                         double limit, double offset) {
  const Operands<View> operands("packed", packed);
  GluBackward a;
  set_packed(a, operands, "grad_packed", grad_packed, layout, a.grad_gate, a.grad_value);
  const int64_t columns = a.columns;
  set_packed(a, operands, "packed", packed, layout, a.gate, a.value);
  STD_TORCH_CHECK(a.columns == columns && grad_packed.numel() == packed.numel(), "grad_packed has not packed's shape");
  a.activation = int(activation);
  a.limit = limit;
  a.offset = offset;
  a.grad_output = operands.rows("grad_output", grad_output, a.rows, a.columns);
  Cpu::run_backward(a, packed, operands.kind);
}

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CPU, m) {
  ckpt::GluOps<ckpt::Cpu>::add_to(m);
  ckpt::add_direct<&ckpt::packed_glu_forward>("packed_glu_forward");
  ckpt::add_direct<&ckpt::packed_glu_backward>("packed_glu_backward");
}
