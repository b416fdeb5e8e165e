// The loops of the row-norm family.
#pragma once

#include "row_norm_backward_rows.h"
#include "row_norm_forward_rows.h"
#include "target.h"

namespace ckpt::CKPT_ISA {

template <class T>
constexpr RowNormLoops row_norm_loops_for() {
  using S = typename ComputeType<T>::type;
  return {forward_rows<S, T>, backward_rows<S, T>, forward_scratch<S>, backward_scratch<S>};
}
CKPT_DEFINE_LOOPS(RowNormLoops, row_norm_loops)

}  // namespace ckpt::CKPT_ISA
