// The glu ops on the CPU: shares rows, and pieces of long ones, out to threads.
#include "../glu_ops.h"

#include <string.h>

#include "device.h"
#include "row_tasks.h"

namespace ckpt {
namespace {

struct Cpu : CpuDevice {
  static void run_forward(const GluForward& a, const View&, ScalarKind kind) {
    for_pieces(a.rows, a.columns,
               [&](int64_t row, int64_t begin, int64_t end) { glu_loops(kind).forward(a, row, begin, end); });
  }
  static void run_backward(const GluBackward& a, const View&, ScalarKind kind) {
    for_pieces(a.rows, a.columns,
               [&](int64_t row, int64_t begin, int64_t end) { glu_loops(kind).backward(a, row, begin, end); });
  }
};

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CPU, m) { ckpt::GluOps<ckpt::Cpu>::add_to(m); }
