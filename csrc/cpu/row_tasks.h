// How rows are shared out to threads, and how the gradients of weights are summed over them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <string.h>

#include <memory>

#include "isa.h"

namespace ckpt {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t compute_size(ScalarKind kind) { return kind == ScalarKind::float64 ? 8 : 4; }

// Work below this many elements is done by the calling thread.
constexpr int64_t parallel_elements = 32768;

// How many runs of `elements` elements a thread takes at the least.
inline int64_t grain(int64_t elements) { return divide_up(parallel_elements, elements < 1 ? 1 : elements); }

// Calls body(row, begin, end) for all columns of all rows, in pieces of rows where these are long. A piece begins at a
// multiple of the columns for which the loops draw dropout factors at a time.
template <class Body>
void for_pieces(int64_t rows, int64_t columns, const Body& body) {
  constexpr int64_t piece = 16384;
  const int64_t pieces = divide_up(columns, piece);
  torch::stable::parallel_for(0, rows * pieces, grain(columns < piece ? columns : piece),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  const int64_t first = i % pieces * piece;
                                  body(i / pieces, first, first + piece < columns ? first + piece : columns);
                                }
                              });
}

// Tasks of some rows each, none of which crosses a group: at most `most` a group, however many threads there are, so
// that what is summed over rows does not depend on the number of threads.
struct RowTasks {
  static constexpr int64_t most = 64, least_rows = 32;
  int64_t groups, group_rows, group_tasks, task_rows;

  RowTasks(int64_t rows, int64_t rows_per_group) : groups(rows / rows_per_group), group_rows(rows_per_group) {
    group_tasks = divide_up(group_rows, least_rows);
    if (group_tasks > most) group_tasks = most;
    task_rows = divide_up(group_rows, group_tasks);
    group_tasks = divide_up(group_rows, task_rows);
  }
  int64_t count() const { return groups * group_tasks; }
  int64_t begin(int64_t task) const { return task / group_tasks * group_rows + task % group_tasks * task_rows; }
  int64_t end(int64_t task) const {
    const int64_t last = begin(task) + task_rows, group_end = (task / group_tasks + 1) * group_rows;
    return last < group_end ? last : group_end;
  }
};

// One gradient that is summed over rows: each task in a row of sums of its own, then these in their order.
class PartialSums {
 public:
  // `gradient` is (groups, columns) in the compute type, or null where nobody wants it.
  PartialSums(void* gradient, const RowTasks& tasks, int64_t columns, ScalarKind kind)
      : gradient_(static_cast<char*>(gradient)),
        tasks_(tasks),
        columns_(columns),
        kind_(kind),
        row_bytes_(columns * compute_size(kind)) {
    if (gradient_ && tasks.group_tasks > 1) sums_.reset(new char[tasks.count() * row_bytes_]);
  }

  // The task's row, zeroed.
  void* of(int64_t task) const {
    if (!gradient_) return nullptr;
    char* row = (sums_ ? sums_.get() : gradient_) + task * row_bytes_;
    memset(row, 0, row_bytes_);
    return row;
  }

  void add_up() const {
    if (!sums_) return;
    for (int64_t group = 0; group < tasks_.groups; ++group) {
      const char* first = sums_.get() + group * tasks_.group_tasks * row_bytes_;
      char* total = gradient_ + group * row_bytes_;
      torch::stable::parallel_for(0, columns_, grain(tasks_.group_tasks), [&](int64_t begin, int64_t end) {
        sum_loops(kind_).sum_rows(first, tasks_.group_tasks, columns_, begin, end, total);
      });
    }
  }

 private:
  char* gradient_;
  const RowTasks& tasks_;
  int64_t columns_;
  ScalarKind kind_;
  int64_t row_bytes_;
  std::unique_ptr<char[]> sums_;
};

}  // namespace ckpt
