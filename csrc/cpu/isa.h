// Which instruction set's build of the loops serves this process.
#pragma once

#include "row_norm.h"

namespace ckpt {

#define CKPT_DECLARE_ISA(name)                           \
  namespace name {                                       \
  const RowNormLoops& row_norm_loops(ScalarKind kind);   \
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
