// Declares the loops over rows, which are built once for each instruction set (target.h), and the functions that select
// the loops of the best set that this processor supports.
#pragma once

#include "../bias_act.h"
#include "../channel_norm.h"
#include "../dyt.h"
#include "../glu.h"
#include "../rotary.h"
#include "../row_norm.h"

namespace ckpt {

// Rows in a tile. The rows of a tile are processed together, so that sums over rows are added up in registers before
// they are added to a sum in memory.
constexpr int64_t tile_rows = 4;

// A part of a matrix: the columns from `begin` to `end` of the rows from `first` to `last`.
struct Part {
  int64_t first, last, begin, end;
};

// The loops of a family for one storage type. Sums over rows are added to the values in memory.
struct RowNormLoops {
  // `scratch` has forward_scratch or backward_scratch elements of the compute type.
  void (*forward)(const RowNormForward&, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const RowNormBackward&, int64_t begin, int64_t end, void* scratch, void* grad_weight,
                   void* grad_bias);
  int64_t (*forward_scratch)(const RowNormForward&);
  int64_t (*backward_scratch)(const RowNormBackward&);
};
struct GluLoops {
  void (*forward)(const GluForward&, const Part&);
  void (*backward)(const GluBackward&, const Part&);
};
struct BiasActLoops {
  void (*forward)(const BiasActForward&, const Part&);
  void (*backward)(const BiasActBackward&, const Part&, void* grad_bias);
};
struct DytLoops {
  void (*forward)(const DytForward&, const Part&);
  void (*backward)(const DytBackward&, const Part&, double* grad_alpha, void* grad_weight, void* grad_bias);
};
struct RotaryLoops {
  // With a norm, `scratch` is a row of the compute type.
  void (*forward)(const RotaryForward&, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const RotaryBackward&, int64_t begin, int64_t end, void* scratch, void* grad_weight,
                   void* grad_bias);
};
struct ChannelNormLoops {
  // `begin` and `end` count planes, or pieces of rows with channels last.
  void (*moments)(const ChannelMoments&, int64_t begin, int64_t end);
  void (*sums)(const ChannelSums&, int64_t begin, int64_t end);
  // `begin` and `end` count rows.
  void (*forward)(const ChannelForward&, int64_t begin, int64_t end);
  void (*backward)(const ChannelBackward&, int64_t begin, int64_t end);
};
struct SumLoops {
  // sum = (onto ? sum : 0) + `count` rows in their order, for the columns from begin to end, in the compute type.
  void (*sum_rows)(const void* rows, int64_t count, int64_t columns, int64_t begin, int64_t end, void* sum, bool onto);
};
struct MapNormLoops {
  // The rows of the block are pixels. The rows of `input` and `output` are channels.
  void (*statistics)(const RowNormForward&);
  void (*output)(const RowNormForward&, Rows input, Rows output);
};
struct TransposeLoops {
  // Elements of the storage type; strides, in elements, are those between rows.
  void (*transpose)(const void* source, int64_t source_stride, int64_t rows, int64_t columns, void* target,
                    int64_t target_stride);
};

#define CKPT_LOOPS(X)                     \
  X(RowNormLoops, row_norm_loops)         \
  X(GluLoops, glu_loops)                  \
  X(BiasActLoops, bias_act_loops)         \
  X(DytLoops, dyt_loops)                  \
  X(RotaryLoops, rotary_loops)            \
  X(ChannelNormLoops, channel_norm_loops) \
  X(MapNormLoops, map_norm_loops)         \
  X(SumLoops, sum_loops)                  \
  X(TransposeLoops, transpose_loops)

#define CKPT_DECLARE(Loops, name) const Loops& name(ScalarKind kind);
// name(kind) returns the loops of the best set for a storage type; avx2::name(kind) etc. return those of one set.
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
namespace avx512_bf16 {
CKPT_LOOPS(CKPT_DECLARE)
}
#endif
#undef CKPT_DECLARE

}  // namespace ckpt
