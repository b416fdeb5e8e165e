// The bias_act ops on the CPU: distributes rows to threads, and sums the gradient of the bias over the rows.
#include "../bias_act_ops.h"

#include "coefficient.h"
#include "device.h"
#include "row_tasks.h"

namespace ckpt {
namespace {

// Whether the computation is the same for every column, and the input is contiguous.
bool is_elementwise(const BiasAct& a) { return !a.bias && !a.dropout && is_one_piece(a.input, a.columns); }

struct Cpu : CpuDevice {
  using Coefficient = ckpt::Coefficient;
  static void run_forward(const BiasActForward& a, const View& input, ScalarKind kind) {
    if (a.rows > 1 && is_elementwise(a) && is_one_piece(a.output, a.columns))
      return run_forward(as_one_row(a), input, kind);
    const BiasActLoops& loops = bias_act_loops(kind);
    for_pieces(a.rows, a.columns, [&](const Part& part) { loops.forward(a, part); });
  }
  static void run_backward(const BiasActBackward& a, const View& input, ScalarKind kind, void* grad_bias) {
    const BiasActLoops& loops = bias_act_loops(kind);
    if (!grad_bias) {
      if (a.rows > 1 && is_elementwise(a) && is_one_piece(a.grad_output, a.columns) &&
          is_one_piece(a.grad_input, a.columns) && is_one_piece(a.output, a.columns))
        return run_backward(as_one_row(a), input, kind, nullptr);
      for_pieces(a.rows, a.columns, [&](const Part& part) { loops.backward(a, part, nullptr); });
      return;
    }
    const RowTasks tasks(a.rows, a.rows, a.columns);
    const PartialSums sums(grad_bias, tasks, a.columns, kind);
    const int64_t shares = shares_of(tasks.wave, grain(a.columns * tasks.task_rows));
    for_tasks(tasks, shares, {&sums}, [&](int64_t, int64_t task) {
      loops.backward(a, {tasks.begin(task), tasks.end(task), 0, a.columns}, sums.of(task));
    });
  }
};

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CPU, m) { ckpt::BiasActOps<ckpt::Cpu>::add_to(m); }
