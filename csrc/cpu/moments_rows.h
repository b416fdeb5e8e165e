// Computes the mean of a run of elements, and the sum of squared deviations from the mean, in one pass.
//
// The pass sums d and d^2 with d = x - c, for a c near the mean: mean = c + sum(d) / n, squares = sum(d^2) - sum(d)^2 /
// n. There is no cancellation as long as the distance from c to the mean is small compared to the deviation. c is the
// mean of the run's first `guess_columns` elements. If c is far from the mean, so are these elements, which makes the
// variance large; hence the relative error of the variance is at most segment_columns / guess_columns times the
// rounding of S. Longer runs are split into segments, whose moments are merged in float64 (T. Chan, G. Golub and
// R. LeVeque, "Algorithms for computing the sample variance", 1983), so that the error does not grow with the length.
#pragma once

#include "target.h"
#include "vec.h"
#include "vec_loops.h"
#include "vec_memory.h"

namespace ckpt::CKPT_ISA {

constexpr int64_t guess_columns = 64, segment_columns = 4096;

// Moments of `count` rows at a time. The sums of one row are a chain of dependent additions, so several rows together
// are faster than one after the other.
template <class S>
struct RowMoments {
  S mean, squares;
};

// The mean of a segment is center + offset, a sum that float32 may round.
template <class S>
struct SegmentMoments {
  S center, offset, squares;
};

template <class S, class U, int count>
CKPT_INLINE void segment_moments(const U* const (&u)[count], int64_t j0, int64_t n,
                                 SegmentMoments<S> (&moments)[count]) {
  const int64_t few = n < guess_columns ? n : guess_columns;
  S center[count], total[count], squares[count];  // the center is near the mean
  for (int i = 0; i < count; ++i) {
    Accumulator<S> guess;
    sweep_values<S>(u[i] + j0, few, [&](Vec<S> value, auto, auto slot) { guess.part[slot.index] += value; });
    center[i] = guess.total() / S(few);
  }
  for (int i = 0; i < count; ++i) {
    Accumulator<S> sum, sum_squares;
    const Vec<S> centers(center[i]);
    sweep_values<S>(u[i] + j0, n, [&](Vec<S> value, auto lanes, auto slot) {
      Vec<S> d = lanes.keep(value - centers);
      sum.part[slot.index] += d;
      sum_squares.part[slot.index] += d * d;
    });
    total[i] = sum.total();
    squares[i] = sum_squares.total() - total[i] * total[i] / S(n);
  }
  for (int i = 0; i < count; ++i) moments[i] = {center[i], total[i] / S(n), squares[i] < 0 ? S(0) : squares[i]};
}

template <class S, class U, int count>
CKPT_INLINE void moments_of(const U* const (&u)[count], int64_t columns, RowMoments<S> (&moments)[count]) {
  SegmentMoments<S> segment[count];
  segment_moments(u, 0, columns < segment_columns ? columns : segment_columns, segment);
  RowMoments<double> merged[count];
  for (int i = 0; i < count; ++i) {
    moments[i] = {segment[i].center + segment[i].offset, segment[i].squares};
    merged[i] = {double(segment[i].center) + double(segment[i].offset), double(segment[i].squares)};
  }
  if (columns <= segment_columns) return;
  for (int64_t j0 = segment_columns; j0 < columns; j0 += segment_columns) {
    const int64_t n = columns - j0 < segment_columns ? columns - j0 : segment_columns;
    segment_moments(u, j0, n, segment);
    for (int i = 0; i < count; ++i) {
      const double mean = double(segment[i].center) + double(segment[i].offset);
      const double delta = mean - merged[i].mean, share = double(n) / double(j0 + n);
      merged[i].mean += delta * share;
      merged[i].squares += double(segment[i].squares) + delta * delta * double(j0) * share;
    }
  }
  for (int i = 0; i < count; ++i) moments[i] = {S(merged[i].mean), S(merged[i].squares)};
}

// The sums of squares. Long rows are summed in segments, so that the error does not grow with their length.
template <class S, class U, int count>
CKPT_INLINE void squares_of(const U* const (&u)[count], int64_t columns, RowMoments<S> (&moments)[count]) {
  for (int i = 0; i < count; ++i) {
    double total = 0;
    for (int64_t j0 = 0; j0 < columns; j0 += segment_columns) {
      const int64_t n = columns - j0 < segment_columns ? columns - j0 : segment_columns;
      Accumulator<S> squares;
      sweep_values<S>(u[i] + j0, n, [&](Vec<S> value, auto, auto slot) { squares.part[slot.index] += value * value; });
      total += double(squares.total());
    }
    moments[i] = {0, S(total)};
  }
}

template <class S>
CKPT_INLINE S square_root(S x) {
  return sizeof(S) == 4 ? S(__builtin_sqrtf(float(x))) : S(__builtin_sqrt(double(x)));
}

// The statistics of `count` rows of a norm. Unless centered, the mean is 0 and the variance is the mean of the squares.
template <class S>
struct Statistics {
  S mean, rstd;
};

template <class S, class U, int count>
CKPT_INLINE void statistics_of(const U* const (&u)[count], int64_t columns, bool centered, S eps,
                               Statistics<S> (&statistics)[count]) {
  RowMoments<S> moments[count];
  if (centered) {
    moments_of(u, columns, moments);
  } else {
    squares_of(u, columns, moments);
  }
  for (int i = 0; i < count; ++i)
    statistics[i] = {moments[i].mean, S(1) / square_root(moments[i].squares / S(columns) + eps)};
}

}  // namespace ckpt::CKPT_ISA
