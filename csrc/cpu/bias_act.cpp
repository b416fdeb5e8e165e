// The bias_act ops on the CPU: shares rows out to threads, and sums the gradient of the bias over them.
#include "../bias_act_ops.h"

#include "coefficient.h"
#include "device.h"
#include "row_tasks.h"

namespace ckpt {
namespace {

struct Cpu : CpuDevice {
  using Coefficient = ckpt::Coefficient;
  static void run_forward(const BiasActForward& a, const View&, ScalarKind kind) {
    for_pieces(a.rows, a.columns,
               [&](int64_t row, int64_t begin, int64_t end) { bias_act_loops(kind).forward(a, row, begin, end); });
  }
  static void run_backward(const BiasActBackward& a, const View&, ScalarKind kind, void* grad_bias) {
    const BiasActLoops& loops = bias_act_loops(kind);
    if (!grad_bias) {
      for_pieces(a.rows, a.columns,
                 [&](int64_t row, int64_t begin, int64_t end) { loops.backward(a, row, begin, end, nullptr); });
      return;
    }
    const RowTasks tasks(a.rows, a.rows, a.columns);
    const PartialSums sums(grad_bias, tasks, a.columns, kind);
    const int64_t shares = shares_of(tasks.wave, grain(a.columns * tasks.task_rows));
    for_tasks(tasks, shares, {&sums}, [&](int64_t, int64_t task) {
      void* sum = sums.of(task);
      for (int64_t row = tasks.begin(task); row < tasks.end(task); ++row) loops.backward(a, row, 0, a.columns, sum);
    });
  }
};

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CPU, m) { ckpt::BiasActOps<ckpt::Cpu>::add_to(m); }
