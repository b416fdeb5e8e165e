// The row loops as each instruction set builds them, and which set's build serves this process.
#pragma once

#include "../row_norm.h"

namespace ckpt {

// The row loops for one storage type in one instruction set. `scratch` holds scratch_size(columns) elements of
// the compute type. The backward loop adds to the weight gradients of the rows it is given.
struct RowNormLoops {
  void (*forward)(const RowNormForward&, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const RowNormBackward&, int64_t begin, int64_t end, void* scratch, void* grad_weight,
                   void* grad_bias);
  void (*sum_partials)(const void* partials, int64_t count, int64_t columns, int64_t begin, int64_t end, void* sum);
  // In elements of the compute type.
  int64_t (*scratch_size)(int64_t columns);
};

#define CKPT_DECLARE_ISA(name)                         \
  namespace name {                                     \
  const RowNormLoops& row_norm_loops(ScalarKind kind); \
  }
CKPT_DECLARE_ISA(generic)
#if defined(__x86_64__)
CKPT_DECLARE_ISA(avx2)
CKPT_DECLARE_ISA(avx512)
#endif
#undef CKPT_DECLARE_ISA

// The name of the chosen set: "generic", "avx2" or "avx512".
const char* isa_name();
const RowNormLoops& row_norm_loops(ScalarKind kind);

}  // namespace ckpt
