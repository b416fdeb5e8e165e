// The mean of a run of elements and the sum of their squared deviations from it, in one pass.
//
// The pass sums d and d^2 with d = x - c, for a c near the mean: mean = c + sum(d) / n, squares = sum(d^2) - sum(d)^2 /
// n. Nothing cancels as long as c is near the mean compared to the deviation. c is the mean of the run's first
// `guess_columns` elements; were it far off, these elements would be far off too, which makes the variance large. So
// the variance's relative error is at most segment_columns / guess_columns times the rounding of S. Longer runs are
// taken in segments, whose moments are merged (T. Chan, G. Golub and R. LeVeque, "Algorithms for computing the sample
// variance", 1983).
#pragma once

#include "target.h"
#include "vec.h"
#include "vec_loops.h"
#include "vec_memory.h"

namespace ckpt::CKPT_ISA {

constexpr int64_t guess_columns = 64, segment_columns = 4096;

template <class S, class U>
CKPT_INLINE void segment_moments(const U* u, int64_t n, S* mean, S* squares) {
  const int64_t few = n < guess_columns ? n : guess_columns;
  Accumulator<S> guess, sum, sum_squares;
  sweep_values<S>(u, few, [&](Vec<S> value, auto, auto slot) { guess.part[slot.index] += value; });
  const S center = guess.total() / S(few);  // near the mean
  sweep_values<S>(u, n, [&](Vec<S> value, auto lanes, auto slot) {
    Vec<S> d = lanes.keep(value - Vec<S>(center));
    sum.part[slot.index] += d;
    sum_squares.part[slot.index] += d * d;
  });
  const S total = sum.total();
  *mean = center + total / S(n);
  *squares = sum_squares.total() - total * total / S(n);
  if (*squares < 0) *squares = 0;
}

template <class S, class U>
CKPT_INLINE void moments_of(const U* u, int64_t columns, S* mean, S* squares) {
  segment_moments(u, columns < segment_columns ? columns : segment_columns, mean, squares);
  for (int64_t j0 = segment_columns; j0 < columns; j0 += segment_columns) {
    const int64_t n = columns - j0 < segment_columns ? columns - j0 : segment_columns;
    S segment_mean, segment_squares;
    segment_moments(u + j0, n, &segment_mean, &segment_squares);
    const S delta = segment_mean - *mean, share = S(n) / S(j0 + n);
    *mean += delta * share;
    *squares += segment_squares + delta * delta * S(j0) * share;
  }
}

template <class S>
CKPT_INLINE S square_root(S x) {
  return sizeof(S) == 4 ? S(__builtin_sqrtf(float(x))) : S(__builtin_sqrt(double(x)));
}

// The statistics of one row of a norm. Where it is not centered, the mean is 0 and the variance is the mean of the
// squares.
template <class S, class U>
CKPT_INLINE void statistics_of(const U* u, int64_t columns, bool centered, S eps, S* mean, S* rstd) {
  S center = 0, sum_squares;
  if (centered) {
    moments_of(u, columns, &center, &sum_squares);
  } else {
    Accumulator<S> squares;
    sweep_values<S>(u, columns, [&](Vec<S> value, auto, auto slot) { squares.part[slot.index] += value * value; });
    sum_squares = squares.total();
  }
  *mean = center;
  *rstd = S(1) / square_root(sum_squares / S(columns) + eps);
}

}  // namespace ckpt::CKPT_ISA
