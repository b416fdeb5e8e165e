// Sums over rows of the compute type: the last step of the gradients of weights.
#pragma once

#include "target.h"
#include "vec.h"
#include "vec_loops.h"
#include "vec_memory.h"

namespace ckpt::CKPT_ISA {

// sum = (onto ? sum : 0) + the `count` rows in their order, for the columns from begin to end.
template <class S>
void sum_rows(const void* rows, int64_t count, int64_t columns, int64_t begin, int64_t end, void* sum, bool onto) {
  const S* source = static_cast<const S*>(rows) + begin;
  S* target = static_cast<S*>(sum) + begin;
  sweep<S>(end - begin, [=](int64_t j, auto lanes, auto) {
    Vec<S> total = load(source + j, lanes);
    if (onto) total = load(target + j, lanes) + total;
    for (int64_t i = 1; i < count; ++i) total += load(source + i * columns + j, lanes);
    store(target + j, total, lanes);
  });
}

template <class T>
constexpr SumLoops sum_loops_for() {
  return {sum_rows<typename ComputeType<T>::type>};
}
CKPT_DEFINE_LOOPS(SumLoops, sum_loops)

}  // namespace ckpt::CKPT_ISA
