// The row-norm ops on the CPU: reads the operands, shares the rows out to threads, sums the weight gradients.
#include <string.h>

#include <memory>
#include <string>

#include "../row_norm_ops.h"
#include "isa.h"

namespace ckpt {
namespace {

// Work below this many elements is done by the calling thread.
constexpr int64_t parallel_elements = 32768;
// Rows are summed in at most this many partial sums a group, however many threads there are, so that the
// weight gradients do not depend on the number of threads.
constexpr int64_t most_partials = 64;
constexpr int64_t least_partial_rows = 32;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows a thread takes at the least.
int64_t row_grain(int64_t columns) { return divide_up(parallel_elements, columns < 1 ? 1 : columns); }

std::unique_ptr<char[]> scratch_for(const RowNormLoops& loops, ScalarKind kind, int64_t columns) {
  int64_t bytes = kind == ScalarKind::float64 ? 8 : 4;
  return std::unique_ptr<char[]>(new char[loops.scratch_size(columns) * bytes]);
}

// A weight or bias as the loops read it: in the compute type, with the offset added.
class Coefficient {
 public:
  Coefficient(const OptionalTensor& tensor, ScalarKind kind, double offset) {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->is_contiguous(), "expected contiguous weight and bias");
    const bool wide = kind == ScalarKind::float64;
    const ScalarKind own = kind_of(*tensor);
    if (offset == 0 && own == (wide ? ScalarKind::float64 : ScalarKind::float32)) {
      data_ = tensor->data_ptr();
      return;
    }
    const int64_t n = tensor->numel();
    converted_.reset(new char[n * (wide ? 8 : 4)]);
    for (int64_t i = 0; i < n; ++i) {
      const double value = element(*tensor, own, i) + offset;
      if (wide)
        reinterpret_cast<double*>(converted_.get())[i] = value;
      else
        reinterpret_cast<float*>(converted_.get())[i] = float(value);
    }
    data_ = converted_.get();
  }
  const void* data() const { return data_; }

 private:
  static double element(const Tensor& tensor, ScalarKind kind, int64_t i) {
    const void* data = tensor.data_ptr();
    switch (kind) {
      case ScalarKind::float32:
        return static_cast<const float*>(data)[i];
      case ScalarKind::bfloat16:
        return static_cast<const torch::headeronly::BFloat16*>(data)[i];
      case ScalarKind::float16:
        return static_cast<const torch::headeronly::Half*>(data)[i];
      default:
        return static_cast<const double*>(data)[i];
    }
  }

  const void* data_ = nullptr;
  std::unique_ptr<char[]> converted_;
};

void run_forward(const RowNormForward& a, ScalarKind kind) {
  const RowNormLoops& loops = row_norm_loops(kind);
  torch::stable::parallel_for(0, a.rows, row_grain(a.columns), [&](int64_t begin, int64_t end) {
    auto scratch = scratch_for(loops, kind, a.columns);
    loops.forward(a, begin, end, scratch.get());
  });
}

// Each task takes a run of rows of one group and sums its weight gradients in its own row of partial sums; the
// rows of partial sums are then added up in their order.
void run_backward(const RowNormBackward& a, ScalarKind kind, void* grad_weight, void* grad_bias) {
  const RowNormLoops& loops = row_norm_loops(kind);
  const int64_t element = kind == ScalarKind::float64 ? 8 : 4;
  const int64_t groups = a.rows / a.rows_per_group;
  int64_t tasks = divide_up(a.rows_per_group, least_partial_rows);
  if (tasks > most_partials) tasks = most_partials;
  const int64_t task_rows = divide_up(a.rows_per_group, tasks);
  tasks = divide_up(a.rows_per_group, task_rows);

  std::unique_ptr<char[]> weight_sums, bias_sums;
  auto partials_for = [&](void* grad, std::unique_ptr<char[]>& owner) -> char* {
    if (!grad || tasks == 1) return static_cast<char*>(grad);
    owner.reset(new char[groups * tasks * a.columns * element]);
    return owner.get();
  };
  char* weight_partials = partials_for(grad_weight, weight_sums);
  char* bias_partials = partials_for(grad_bias, bias_sums);

  const int64_t task_grain = divide_up(row_grain(a.columns), task_rows);
  torch::stable::parallel_for(0, groups * tasks, task_grain, [&](int64_t begin, int64_t end) {
    auto scratch = scratch_for(loops, kind, a.columns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group_start = task / tasks * a.rows_per_group;
      const int64_t first = group_start + task % tasks * task_rows;
      const int64_t group_end = group_start + a.rows_per_group;
      const int64_t last = first + task_rows < group_end ? first + task_rows : group_end;
      auto zeroed = [&](char* partials) -> char* {
        if (!partials) return nullptr;
        char* own = partials + task * a.columns * element;
        memset(own, 0, a.columns * element);
        return own;
      };
      loops.backward(a, first, last, scratch.get(), zeroed(weight_partials), zeroed(bias_partials));
    }
  });

  if (tasks == 1) return;
  const int64_t column_grain = divide_up(parallel_elements, tasks);
  auto add_up = [&](const char* partials, void* grad) {
    if (!grad) return;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t row = group * a.columns * element;
      torch::stable::parallel_for(0, a.columns, column_grain, [&](int64_t begin, int64_t end) {
        loops.sum_partials(partials + row * tasks, tasks, a.columns, begin, end, static_cast<char*>(grad) + row);
      });
    }
  };
  add_up(weight_partials, grad_weight);
  add_up(bias_partials, grad_bias);
}

struct Cpu {
  using Coefficient = ckpt::Coefficient;
  static void run_forward(const RowNormForward& a, const Tensor&, ScalarKind kind) { ckpt::run_forward(a, kind); }
  static void run_backward(const RowNormBackward& a, const Tensor&, ScalarKind kind, void* grad_weight,
                           void* grad_bias) {
    ckpt::run_backward(a, kind, grad_weight, grad_bias);
  }
};

std::string cpu_isa() { return isa_name(); }

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CPU, m) { ckpt::RowNormOps<ckpt::Cpu>::add_to(m); }

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&ckpt::cpu_isa));
}
