// The DyT ops on the CPU: distributes rows to threads, and sums the gradients of alpha, weight and bias over the rows.
#include "../dyt_ops.h"

#include "coefficient.h"
#include "device.h"
#include "row_tasks.h"

namespace ckpt {
namespace {

// Adds the sums of the tasks, in the order of the tasks.
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
    for_pieces(a.rows, a.columns, [&](const Part& part) { loops.forward(a, part); });
  }
  static void run_backward(const DytBackward& a, const View&, ScalarKind kind, void* grad_alpha, void* grad_weight,
                           void* grad_bias) {
    const DytLoops& loops = dyt_loops(kind);
    if (!grad_alpha && !grad_weight && !grad_bias) {
      for_pieces(a.rows, a.columns, [&](const Part& part) { loops.backward(a, part, nullptr, nullptr, nullptr); });
      return;
    }
    const RowTasks tasks(a.rows, a.rows, a.columns);
    const PartialSums weight_sums(grad_weight, tasks, a.columns, kind), bias_sums(grad_bias, tasks, a.columns, kind);
    // One sum a task.
    const Scratch alpha_sums(tasks.count() * int64_t(sizeof(double)));
    memset(alpha_sums.data(), 0, tasks.count() * sizeof(double));
    const int64_t shares = shares_of(tasks.wave, grain(a.columns * tasks.task_rows));
    for_tasks(tasks, shares, {&weight_sums, &bias_sums}, [&](int64_t, int64_t task) {
      double* alpha_sum = grad_alpha ? alpha_sums.as<double>() + task : nullptr;
      loops.backward(a, {tasks.begin(task), tasks.end(task), 0, a.columns}, alpha_sum, weight_sums.of(task),
                     bias_sums.of(task));
    });
    if (grad_alpha) add_up(alpha_sums.as<double>(), tasks.count(), grad_alpha, kind);
  }
};

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CPU, m) { ckpt::DytOps<ckpt::Cpu>::add_to(m); }
