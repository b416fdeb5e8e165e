// The loops over rows as each instruction set builds them, and which set's build serves this process.
#pragma once

#include <utility>

#include "../bias_act.h"
#include "../channel_norm.h"
#include "../glu.h"
#include "../row_norm.h"

namespace ckpt {

// Rows whose weight gradients are added up in registers before the partial sums are touched.
constexpr int64_t block_rows = 4;

// The loops of a family for one storage type in one instruction set. Those that are summed over rows add to the sums
// of the rows that they are given.
struct RowNormLoops {
  // `scratch` holds as many elements of the compute type as the block's own function says.
  void (*forward)(const RowNormForward&, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const RowNormBackward&, int64_t begin, int64_t end, void* scratch, void* grad_weight,
                   void* grad_bias);
  int64_t (*forward_scratch)(const RowNormForward&);
  int64_t (*backward_scratch)(const RowNormBackward&);
};
struct GluLoops {
  // For the columns from begin to end of one row.
  void (*forward)(const GluForward&, int64_t row, int64_t begin, int64_t end);
  void (*backward)(const GluBackward&, int64_t row, int64_t begin, int64_t end);
};
struct BiasActLoops {
  void (*forward)(const BiasActForward&, int64_t row, int64_t begin, int64_t end);
  void (*backward)(const BiasActBackward&, int64_t row, int64_t begin, int64_t end, void* grad_bias);
};
struct ChannelNormLoops {
  // For planes, or pieces of rows, from begin to end; and for rows.
  void (*moments)(const ChannelMoments&, int64_t begin, int64_t end);
  void (*forward)(const ChannelForward&, int64_t begin, int64_t end);
  void (*sums)(const ChannelSums&, int64_t begin, int64_t end);
  void (*backward)(const ChannelBackward&, int64_t begin, int64_t end);
};
struct SumLoops {
  // Adds up `count` rows in their order, for the columns from begin to end, onto the sum that is there or in its place;
  // all in the compute type.
  void (*sum_rows)(const void* rows, int64_t count, int64_t columns, int64_t begin, int64_t end, void* sum, bool onto);
};

#define CKPT_LOOPS(X)                     \
  X(RowNormLoops, row_norm_loops)         \
  X(GluLoops, glu_loops)                  \
  X(BiasActLoops, bias_act_loops)         \
  X(ChannelNormLoops, channel_norm_loops) \
  X(SumLoops, sum_loops)

#define CKPT_DECLARE(Loops, name) const Loops& name(ScalarKind kind);
// Those of the chosen set, and of each.
CKPT_LOOPS(CKPT_DECLARE)
namespace generic {
CKPT_LOOPS(CKPT_DECLARE)
}
#if defined(__x86_64__)
namespace avx2 {
CKPT_LOOPS(CKPT_DECLARE)
}
namespace avx512 {
CKPT_LOOPS(CKPT_DECLARE)
}
#endif
#undef CKPT_DECLARE

}  // namespace ckpt
