// The row-norm ops on the CPU: reads the operands, distributes the rows to threads, and sums the weight gradients.
#include "../row_norm_ops.h"

#include "coefficient.h"
#include "device.h"
#include "row_tasks.h"

namespace ckpt {
namespace {

void run_forward(const RowNormForward& a, ScalarKind kind) {
  const RowNormLoops& loops = row_norm_loops(kind);
  const int64_t shares = shares_of(a.rows, grain(a.columns));
  const int64_t bytes = loops.forward_scratch(a) * compute_size(kind);
  const Scratch scratch(shares * bytes);
  for_shares(a.rows, shares, [&](int64_t share, int64_t begin, int64_t end) {
    loops.forward(a, begin, end, scratch.data() + share * bytes);
  });
}

void run_backward(const RowNormBackward& a, ScalarKind kind, void* grad_weight, void* grad_bias) {
  const RowNormLoops& loops = row_norm_loops(kind);
  const RowTasks tasks(a.rows, a.rows_per_group, a.columns);
  const PartialSums weight_sums(grad_weight, tasks, a.columns, kind), bias_sums(grad_bias, tasks, a.columns, kind);
  const int64_t shares = shares_of(tasks.wave, grain(a.columns * tasks.task_rows));
  const int64_t bytes = loops.backward_scratch(a) * compute_size(kind);
  const Scratch scratch(shares * bytes);
  for_tasks(tasks, shares, {&weight_sums, &bias_sums}, [&](int64_t share, int64_t task) {
    loops.backward(a, tasks.begin(task), tasks.end(task), scratch.data() + share * bytes, weight_sums.of(task),
                   bias_sums.of(task));
  });
}

struct Cpu : CpuDevice {
  using Coefficient = ckpt::Coefficient;
  static void run_forward(const RowNormForward& a, const View&, ScalarKind kind) { ckpt::run_forward(a, kind); }
  static void run_backward(const RowNormBackward& a, const View&, ScalarKind kind, void* grad_weight, void* grad_bias) {
    ckpt::run_backward(a, kind, grad_weight, grad_bias);
  }
};

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CPU, m) { ckpt::RowNormOps<ckpt::Cpu>::add_to(m); }
