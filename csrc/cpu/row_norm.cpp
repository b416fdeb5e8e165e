// The row-norm ops on the CPU: reads the operands, shares the rows out to threads, sums the weight gradients.
#include "../row_norm_ops.h"

#include <string.h>

#include <memory>

#include "coefficient.h"
#include "row_tasks.h"

namespace ckpt {
namespace {

std::unique_ptr<char[]> scratch_for(const RowNormLoops& loops, ScalarKind kind, int64_t columns) {
  return std::unique_ptr<char[]>(new char[loops.scratch_size(columns) * compute_size(kind)]);
}

void run_forward(const RowNormForward& a, ScalarKind kind) {
  const RowNormLoops& loops = row_norm_loops(kind);
  torch::stable::parallel_for(0, a.rows, grain(a.columns), [&](int64_t begin, int64_t end) {
    auto scratch = scratch_for(loops, kind, a.columns);
    loops.forward(a, begin, end, scratch.get());
  });
}

void run_backward(const RowNormBackward& a, ScalarKind kind, void* grad_weight, void* grad_bias) {
  const RowNormLoops& loops = row_norm_loops(kind);
  const RowTasks tasks(a.rows, a.rows_per_group);
  const PartialSums weight_sums(grad_weight, tasks, a.columns, kind), bias_sums(grad_bias, tasks, a.columns, kind);
  torch::stable::parallel_for(0, tasks.count(), grain(a.columns * tasks.task_rows), [&](int64_t begin, int64_t end) {
    auto scratch = scratch_for(loops, kind, a.columns);
    for (int64_t task = begin; task < end; ++task)
      loops.backward(a, tasks.begin(task), tasks.end(task), scratch.get(), weight_sums.of(task), bias_sums.of(task));
  });
  weight_sums.add_up();
  bias_sums.add_up();
}

struct Cpu {
  using Coefficient = ckpt::Coefficient;
  static void run_forward(const RowNormForward& a, const Tensor&, ScalarKind kind) { ckpt::run_forward(a, kind); }
  static void run_backward(const RowNormBackward& a, const Tensor&, ScalarKind kind, void* grad_weight,
                           void* grad_bias) {
    ckpt::run_backward(a, kind, grad_weight, grad_bias);
  }
};

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CPU, m) { ckpt::RowNormOps<ckpt::Cpu>::add_to(m); }
