// The rotary ops on the CPU: reads the tables, distributes the rows to threads, and sums the weight gradients.
#include "../rotary_ops.h"

#include "../math/storage.h"
#include "coefficient.h"
#include "device.h"
#include "row_tasks.h"

namespace ckpt {
namespace {

template <class S, class T>
S converted(T x) {
  if constexpr (std::is_same_v<T, double>)
    return S(x);
  else
    return S(to_float(x));
}

// A table in the form that the loops read: in the compute type, with the entries of first elements before those of
// second elements. Uses the tensor's own memory if the form fits; otherwise a copy of all distinct rows.
class Table {
 public:
  Table(const Angles& given, const Rotary& a, ScalarKind storage)
      : angles_(given),
        kind_(storage == ScalarKind::float64 ? storage : ScalarKind::float32),
        sizes_{given.rows.stride ? a.rows / (a.middle * a.inner) : 1, given.rows.middle_stride ? a.middle : 1,
               given.rows.inner_stride ? a.inner : 1},
        entries_(given.shift ? a.rotary_dim : a.pairs()),
        is_given_(given.kind == kind_ && given.step == 1),
        copy_(is_given_ ? 0 : sizes_[0] * sizes_[1] * sizes_[2] * entries_ * compute_size(kind_)) {
    if (is_given_) return;
    kind_ == ScalarKind::float64 ? convert_to<double>(given, a) : convert_to<float>(given, a);
    const auto stride = [&](int64_t size, int64_t below) { return size > 1 ? below * entries_ : 0; };
    angles_.rows = {copy_.data(), stride(sizes_[0], sizes_[1] * sizes_[2])};
    angles_.rows.middle_stride = stride(sizes_[1], sizes_[2]);
    angles_.rows.inner_stride = stride(sizes_[2], 1);
    angles_.kind = kind_;
    angles_.step = 1;
    angles_.shift = given.shift ? a.pairs() : 0;
  }
  const Angles& angles() const { return angles_; }

 private:
  template <class S>
  void convert_to(const Angles& given, const Rotary& a) const {
    switch (given.kind) {
      case ScalarKind::float32:
        return convert<S, float>(given, a);
      case ScalarKind::bfloat16:
        return convert<S, bfloat16>(given, a);
      case ScalarKind::float16:
        return convert<S, float16>(given, a);
      default:
        return convert<S, double>(given, a);
    }
  }

  template <class S, class T>
  void convert(const Angles& given, const Rotary& a) const {
    const int64_t pairs = a.pairs(), runs = given.shift ? 2 : 1;
    torch::stable::parallel_for(0, sizes_[0] * sizes_[1] * sizes_[2], grain(entries_), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t above = i / sizes_[2];
        const T* row = given.rows.at<const T>({above / sizes_[1], above % sizes_[1], i % sizes_[2]});
        S* copy = copy_.as<S>() + i * entries_;
        for (int64_t run = 0; run < runs; ++run)
          for (int64_t k = 0; k < pairs; ++k)
            copy[run * pairs + k] = converted<S>(row[k * given.step + run * given.shift]);
      }
    });
  }

  Angles angles_;
  const ScalarKind kind_;
  const int64_t sizes_[3], entries_;
  const bool is_given_;
  const Scratch copy_;
};

// The bytes of a thread's row of scratch, rounded up to whole cache lines.
int64_t row_bytes(const Rotary& a, ScalarKind kind) {
  return a.norm == HeadNorm::none ? 0 : divide_up(a.columns * compute_size(kind), 64) * 64;
}

struct Cpu : CpuDevice {
  using Coefficient = ckpt::Coefficient;
  using Table = ckpt::Table;

  static void run_forward(const RotaryForward& a, const View&, ScalarKind kind) {
    const int64_t shares = shares_of(a.rows, grain(a.columns)), bytes = row_bytes(a, kind);
    const Scratch scratch(shares * bytes);
    for_shares(a.rows, shares, [&](int64_t share, int64_t begin, int64_t end) {
      rotary_loops(kind).forward(a, begin, end, scratch.data() + share * bytes);
    });
  }

  static void run_backward(const RotaryBackward& a, const View&, ScalarKind kind, void* grad_weight, void* grad_bias) {
    const RotaryLoops& loops = rotary_loops(kind);
    const int64_t bytes = row_bytes(a, kind);
    if (!grad_weight && !grad_bias) {
      const int64_t shares = shares_of(a.rows, grain(a.columns));
      const Scratch scratch(shares * bytes);
      for_shares(a.rows, shares, [&](int64_t share, int64_t begin, int64_t end) {
        loops.backward(a, begin, end, scratch.data() + share * bytes, nullptr, nullptr);
      });
      return;
    }
    const RowTasks tasks(a.rows, a.rows, a.columns);
    const PartialSums weight_sums(grad_weight, tasks, a.columns, kind), bias_sums(grad_bias, tasks, a.columns, kind);
    const int64_t shares = shares_of(tasks.wave, grain(a.columns * tasks.task_rows));
    const Scratch scratch(shares * bytes);
    for_tasks(tasks, shares, {&weight_sums, &bias_sums}, [&](int64_t share, int64_t task) {
      loops.backward(a, tasks.begin(task), tasks.end(task), scratch.data() + share * bytes, weight_sums.of(task),
                     bias_sums.of(task));
    });
  }
};

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CPU, m) { ckpt::RotaryOps<ckpt::Cpu>::add_to(m); }
