// The DyT ops on the CPU: shares rows out to threads, and sums the gradients of alpha, weight and bias over them.
#include "../dyt_ops.h"

#include "coefficient.h"
#include "device.h"
#include "row_tasks.h"

namespace ckpt {
namespace {

// The sum of what each task has summed, in their order.
void add_up(const double* sums, int64_t tasks, void* total, ScalarKind kind) {
  double sum = 0;
  for (int64_t task = 0; task < tasks; ++task) sum += sums[task];
  if (kind == ScalarKind::float64)
    *static_cast<double*>(total) = sum;
  else
    *static_cast<float*>(total) = float(sum);
}

struct Cpu : CpuDevice {
  using Coefficient = ckpt::Coefficient;
  static void run_forward(const DytForward& a, const View&, ScalarKind kind) {
    const DytLoops& loops = dyt_loops(kind);
    for_pieces(a.rows, a.columns, [&](int64_t row, int64_t begin, int64_t end) { loops.forward(a, row, begin, end); });
  }
  static void run_backward(const DytBackward& a, const View&, ScalarKind kind, void* grad_alpha, void* grad_weight,
                           void* grad_bias) {
    const DytLoops& loops = dyt_loops(kind);
    if (!grad_alpha && !grad_weight && !grad_bias) {
      for_pieces(a.rows, a.columns, [&](int64_t row, int64_t begin, int64_t end) {
        loops.backward(a, row, begin, end, nullptr, nullptr, nullptr);
      });
      return;
    }
    const RowTasks tasks(a.rows, a.rows, a.columns);
    const PartialSums weight_sums(grad_weight, tasks, a.columns, kind), bias_sums(grad_bias, tasks, a.columns, kind);
    double alpha_sums[RowTasks::most] = {};
    const int64_t shares = shares_of(tasks.wave, grain(a.columns * tasks.task_rows));
    for_tasks(tasks, shares, {&weight_sums, &bias_sums}, [&](int64_t, int64_t task) {
      double* alpha_sum = grad_alpha ? &alpha_sums[task] : nullptr;
      void *weight_sum = weight_sums.of(task), *bias_sum = bias_sums.of(task);
      for (int64_t row = tasks.begin(task); row < tasks.end(task); ++row)
        loops.backward(a, row, 0, a.columns, alpha_sum, weight_sum, bias_sum);
    });
    if (grad_alpha) add_up(alpha_sums, tasks.count(), grad_alpha, kind);
  }
};

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CPU, m) { ckpt::DytOps<ckpt::Cpu>::add_to(m); }
