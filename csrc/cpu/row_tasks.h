// Distributes rows to threads, and sums the gradients of weights over rows.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <string.h>

#include <initializer_list>

#include "isa.h"
#include "scratch.h"

namespace ckpt {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Below this many elements the calling thread does all the work.
constexpr int64_t parallel_elements = 32768;

// The least number of runs of `elements` elements each that is worth a thread.
inline int64_t grain(int64_t elements) { return divide_up(parallel_elements, elements < 1 ? 1 : elements); }

// Calls body(part) for parts that cover a matrix: whole rows, or pieces of long rows. A piece begins at a multiple of
// chunk_columns, so that the loops draw the same dropout factors for any division of a row.
template <class Body>
void for_pieces(int64_t rows, int64_t columns, const Body& body) {
  constexpr int64_t piece = 16384;
  const int64_t pieces = divide_up(columns, piece);
  torch::stable::parallel_for(
      0, rows * pieces, grain(columns < piece ? columns : piece), [&](int64_t begin, int64_t end) {
        if (pieces == 1) return body(Part{begin, end, 0, columns});
        for (int64_t i = begin; i < end;) {
          const int64_t row = i / pieces, row_end = (row + 1) * pieces, last = row_end < end ? row_end : end;
          body(Part{row, row + 1, i % pieces * piece, last == row_end ? columns : last % pieces * piece});
          i = last;
        }
      });
}

// Whether a matrix with `columns` columns is contiguous, so that the loops may treat the matrix as one long row. An
// unset matrix counts as contiguous.
inline bool is_one_piece(const Rows& matrix, int64_t columns) {
  return !matrix || (matrix.inner == 0 && matrix.stride == columns);
}

// The same block with one long row, which costs less than many short rows. For elementwise blocks.
template <class Block>
Block as_one_row(Block a) {
  a.columns *= a.rows;
  a.rows = 1;
  return a;
}

// Divides the range from 0 to `count` into `shares` shares, and calls body(share, begin, end) for each on a thread.
template <class Body>
void for_shares(int64_t count, int64_t shares, const Body& body) {
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i, count * i / shares, count * (i + 1) / shares);
  });
}

// The number of shares of `count`: one a thread, but none smaller than `least`.
inline int64_t shares_of(int64_t count, int64_t least) {
  const int64_t threads = torch::stable::get_num_threads(), shares = divide_up(count, least);
  return shares < threads ? shares : threads;
}

// Divides the rows of each group into up to `most` tasks, each with one partial sum; into more, of at most `most_rows`
// rows, if there are very many rows, because the rounding error grows with the rows of a task. Tasks do not depend on
// the number of threads, so neither does the rounding of the sums. Tasks run in waves of just enough tasks to keep all
// threads busy, so that the partial sums of only one wave need memory.
struct RowTasks {
  static constexpr int64_t most = 64, least_rows = 32, most_rows = 2048, wave_elements = 1 << 21;
  int64_t groups, group_rows, group_tasks, task_rows, wave;

  // The rows of a task are a multiple of `multiple`, except those of the last.
  RowTasks(int64_t rows, int64_t rows_per_group, int64_t columns, int64_t multiple = tile_rows)
      : groups(rows / rows_per_group), group_rows(rows_per_group) {
    group_tasks = divide_up(group_rows, least_rows);
    if (group_tasks > most) group_tasks = most;
    if (group_tasks * most_rows < group_rows) group_tasks = divide_up(group_rows, most_rows);
    task_rows = divide_up(divide_up(group_rows, group_tasks), multiple) * multiple;
    group_tasks = divide_up(group_rows, task_rows);
    wave = divide_up(wave_elements, task_rows * columns);
    const int64_t threads = torch::stable::get_num_threads();
    if (wave < threads) wave = threads;
    if (wave > count()) wave = count();
  }
  int64_t count() const { return groups * group_tasks; }
  int64_t begin(int64_t task) const { return task / group_tasks * group_rows + task % group_tasks * task_rows; }
  int64_t end(int64_t task) const {
    const int64_t last = begin(task) + task_rows, group_end = (task / group_tasks + 1) * group_rows;
    return last < group_end ? last : group_end;
  }
};

// The sums of one gradient over the rows: each task adds to its own row, and these rows are then added in order.
class PartialSums {
 public:
  // `gradient` is (groups, columns) in the compute type, or null if not needed.
  PartialSums(void* gradient, const RowTasks& tasks, int64_t columns, ScalarKind kind)
      : gradient_(static_cast<char*>(gradient)),
        tasks_(tasks),
        columns_(columns),
        kind_(kind),
        row_bytes_(columns * compute_size(kind)),
        partial_(gradient && tasks.group_tasks > 1),
        sums_(partial_ ? tasks.wave * row_bytes_ : 0) {}

  // The task's row, zeroed.
  void* of(int64_t task) const {
    if (!gradient_) return nullptr;
    char* row = partial_ ? sums_.data() + task % tasks_.wave * row_bytes_ : gradient_ + task * row_bytes_;
    memset(row, 0, row_bytes_);
    return row;
  }

  // Adds the rows of a wave, the tasks from begin to end, to the sums of the waves before.
  void add_up(int64_t begin, int64_t end) const {
    if (!partial_) return;
    for (int64_t first = begin; first < end;) {
      const int64_t group = first / tasks_.group_tasks, group_begin = group * tasks_.group_tasks;
      const int64_t group_end = group_begin + tasks_.group_tasks, last = group_end < end ? group_end : end;
      const char* rows = sums_.data() + (first - begin) * row_bytes_;
      char* total = gradient_ + group * row_bytes_;
      torch::stable::parallel_for(0, columns_, grain(last - first), [&](int64_t from, int64_t to) {
        sum_loops(kind_).sum_rows(rows, last - first, columns_, from, to, total, first > group_begin);
      });
      first = last;
    }
  }

 private:
  char* gradient_;
  const RowTasks& tasks_;
  int64_t columns_;
  ScalarKind kind_;
  int64_t row_bytes_;
  bool partial_;
  Scratch sums_;
};

// Calls body(share, task) for all tasks, wave by wave, and adds up the sums of each wave.
template <class Body>
void for_tasks(const RowTasks& tasks, int64_t shares, std::initializer_list<const PartialSums*> sums,
               const Body& body) {
  for (int64_t first = 0; first < tasks.count(); first += tasks.wave) {
    const int64_t left = tasks.count() - first, count = left < tasks.wave ? left : tasks.wave;
    for_shares(count, shares < count ? shares : count, [&](int64_t share, int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) body(share, first + task);
    });
    for (const PartialSums* each : sums) each->add_up(first, first + count);
  }
}

}  // namespace ckpt
