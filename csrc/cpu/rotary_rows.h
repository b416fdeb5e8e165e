// The loops of the rotary family (csrc/rotary.h): rotary position embeddings (J. Su et al., "RoFormer: Enhanced
// transformer with rotary position embedding", 2021), after an optional norm over each head.
//
// The backward pass applies the transpose of the rotation: a pair of gradients (g1, g2) of the output gives that of z,
//   (g1 * cos1 + g2 * sin2, g2 * cos2 - g1 * sin1).
// With h = dL/dz, the norm's gradients are those of a row norm (row_norm_backward_rows.h): with k = h * weight and N
// columns, dL/dinput = rstd * (k - x_hat * c1 - c2) with c1 = mean(k * x_hat) and c2 = mean(k), which is 0 in an
// RMSNorm; dL/dweight = sum(h * x_hat) and dL/dbias = sum(h) over the rows. Scratch holds a row between the norm and
// the rotation. S is the compute type, T the storage type.
#pragma once

#include "../rotary.h"
#include "moments_rows.h"
#include "target.h"
#include "vec.h"
#include "vec_loops.h"
#include "vec_memory.h"
#include "vec_pairs.h"
#include "vec_stream.h"

namespace ckpt::CKPT_ISA {

// Calls body(place) for the rows from begin to end.
template <class Body>
CKPT_INLINE void for_places(const Rotary& a, int64_t begin, int64_t end, Body body) {
  Place place = a.place(begin);
  for (int64_t row = begin; row < end; ++row) {
    body(place);
    if (++place.inner < a.inner) continue;
    place.inner = 0;
    if (++place.middle < a.middle) continue;
    place.middle = 0;
    ++place.outer;
  }
}

// Rotates the pairs of a row by the angles; with `back`, by the transpose.
template <bool back, class S>
struct Turn {
  const S *cos1, *cos2, *sin1, *sin2;

  CKPT_INLINE Turn(const Rotary& a, const Place& place)
      : cos1(a.cos.rows.at<const S>(place)),
        cos2(cos1 + a.cos.shift),
        sin1(a.sin.rows.at<const S>(place)),
        sin2(sin1 + a.sin.shift) {}
  template <class Lanes>
  CKPT_INLINE Pairs<S> operator()(Pairs<S> x, int64_t j, Lanes lanes) const {
    const Vec<S> c1 = load(cos1 + j, lanes), s1 = load(sin1 + j, lanes);
    const Vec<S> c2 = load(cos2 + j, lanes), s2 = load(sin2 + j, lanes);
    if (back) return {x.first * c1 + x.second * s2, x.second * c2 - x.first * s1};
    return {x.first * c1 - x.second * s1, x.second * c2 + x.first * s2};
  }
};

// The pairs of a row from pair j on; pair 0 begins at column `start`.
template <bool interleaved, class S, class T>
CKPT_INLINE void put_pairs(const Written<T>& target, int64_t start, int64_t pairs, int64_t j, Pairs<S> turned,
                           Full<S> all) {
  const int64_t first = interleaved ? start + 2 * j : start + j;
  if (interleaved) turned = interleave(turned);
  target.put(first, turned.first, all);
  target.put(first + (interleaved ? Vec<S>::width : pairs), turned.second, all);
}
template <bool interleaved, class S, class T>
CKPT_INLINE void put_pairs(const Written<T>& target, int64_t start, int64_t pairs, int64_t j, Pairs<S> turned,
                           Partial<S> lanes) {
  T* first = target.row + start;
  store_pairs<interleaved>(first, first + pairs, j, turned, lanes);
}

// Rotates one row. From and To say whether pairs are interleaved in the source and in the target.
template <bool From, bool To, bool back, class S, class T, class U>
CKPT_INLINE void turn_row(const Rotary& a, const Place& place, const T* source, Written<U> target) {
  const int64_t pairs = a.pairs(), end = a.start + a.rotary_dim;
  const T* part = source + a.start;
  const Turn<back, S> turn(a, place);
  // Streamed stores need whole cache lines.
  target.streams = target.streams && a.start * int64_t(sizeof(U)) % 64 == 0 && pairs * int64_t(sizeof(U)) % 64 == 0;
  step<S>(pairs, [&](int64_t j, auto lanes) {
    const Pairs<S> turned = turn(load_pairs<From, S>(part, part + (From ? 1 : pairs), j, lanes), j, lanes);
    put_pairs<To>(target, a.start, pairs, j, turned, lanes);
  });
  auto pass = [&](int64_t first, int64_t last) {
    step<S>(last - first,
            [&](int64_t j, auto lanes) { target.put(first + j, Vec<S>(load(source + first + j, lanes)), lanes); });
  };
  pass(0, a.start);
  pass(end, a.columns);
}

// Calls body(From, To) with two constants, one for each layout.
template <bool interleaved>
struct Layout {
  static constexpr bool value = interleaved;
};
template <class Body>
CKPT_INLINE void visit_layouts(bool from, bool to, Body body) {
  if (from)
    to ? body(Layout<true>{}, Layout<true>{}) : body(Layout<true>{}, Layout<false>{});
  else
    to ? body(Layout<false>{}, Layout<true>{}) : body(Layout<false>{}, Layout<false>{});
}

template <class S>
struct HeadStatistics {
  Vec<S> mean, rstd;

  template <class T>
  CKPT_INLINE HeadStatistics(const Rotary& a, const T* x) {
    const T* const row[] = {x};
    Statistics<S> found[1];
    statistics_of(row, a.columns, a.norm == HeadNorm::layer, S(a.eps), found);
    mean = Vec<S>(double(found[0].mean));
    rstd = Vec<S>(double(found[0].rstd));
  }
};

// Computes z of one row.
template <class S, class T>
CKPT_INLINE void normalize_head(const Rotary& a, const T* x, S* z) {
  const HeadStatistics<S> statistics(a, x);
  const S *weight = static_cast<const S*>(a.weight), *bias = static_cast<const S*>(a.bias);
  sweep<S>(a.columns, [&](int64_t j, auto lanes, auto) {
    Vec<S> value = rounded_if<S, T>(a.cast_before_weight, (load(x + j, lanes) - statistics.mean) * statistics.rstd);
    if (weight) value = value * load(weight + j, lanes);
    if (bias) value = value + load(bias + j, lanes);
    store(z + j, value, lanes);
  });
}

// Computes the norm's gradients of one row from h = dL/dz, which is overwritten. The row's part is added to the sums
// for the gradients of weight and bias; a sum is null if not needed.
template <class S, class T>
CKPT_INLINE void differentiate_head(const RotaryBackward& a, const Place& place, S* h, S* grad_weight, S* grad_bias) {
  const T* x = a.input.at<const T>(place);
  const HeadStatistics<S> statistics(a, x);
  const S* weight = static_cast<const S*>(a.weight);
  Accumulator<S> sum, sum_x_hat;
  sweep<S>(a.columns, [&](int64_t j, auto lanes, auto slot) {
    Vec<S> x_hat = (load(x + j, lanes) - statistics.mean) * statistics.rstd, k = load(h + j, lanes);
    if (grad_weight) {
      const Vec<S> seen = rounded_if<S, T>(a.cast_before_weight, x_hat);
      store(grad_weight + j, load(grad_weight + j, lanes) + k * seen, lanes);
    }
    if (grad_bias) store(grad_bias + j, load(grad_bias + j, lanes) + k, lanes);
    if (weight) {
      k = k * load(weight + j, lanes);
      store(h + j, k, lanes);
    }
    sum.part[slot.index] += k;
    sum_x_hat.part[slot.index] += k * x_hat;
  });
  if (!a.grad_input) return;
  const Vec<S> c1(double(sum_x_hat.total() / S(a.columns)));
  const Vec<S> c2(a.norm == HeadNorm::layer ? double(sum.total() / S(a.columns)) : 0.0);
  const Written<T> grad_input(a.grad_input.at<T>(place), a.rows, a.columns);
  sweep<S>(a.columns, [&](int64_t j, auto lanes, auto) {
    const Vec<S> x_hat = (load(x + j, lanes) - statistics.mean) * statistics.rstd;
    grad_input.put(j, (load(h + j, lanes) - x_hat * c1 - c2) * statistics.rstd, lanes);
  });
}

template <class S, class T>
void rotary_forward(const RotaryForward& a, int64_t begin, int64_t end, void* scratch) {
  S* z = static_cast<S*>(scratch);
  visit_layouts(a.interleaved, a.interleaved_output, [&](auto from, auto to) {
    for_places(a, begin, end, [&](const Place& place) {
      const T* x = a.input.at<const T>(place);
      const Written<T> output(a.output.at<T>(place), a.rows, a.columns);
      if (a.norm == HeadNorm::none) return turn_row<from.value, to.value, false, S>(a, place, x, output);
      normalize_head<S>(a, x, z);
      turn_row<from.value, to.value, false, S>(a, place, (const S*)z, output);
    });
  });
  end_streams();
}

template <class S, class T>
void rotary_backward(const RotaryBackward& a, int64_t begin, int64_t end, void* scratch, void* grad_weight,
                     void* grad_bias) {
  S *h = static_cast<S*>(scratch), *gw = static_cast<S*>(grad_weight), *gb = static_cast<S*>(grad_bias);
  visit_layouts(a.interleaved_output, a.interleaved, [&](auto from, auto to) {
    for_places(a, begin, end, [&](const Place& place) {
      const T* grad_output = a.grad_output.at<const T>(place);
      if (a.norm == HeadNorm::none) {
        const Written<T> grad_input(a.grad_input.at<T>(place), a.rows, a.columns);
        return turn_row<from.value, to.value, true, S>(a, place, grad_output, grad_input);
      }
      turn_row<from.value, to.value, true, S>(a, place, grad_output, Written<S>(h, 0, 0));
      differentiate_head<S, T>(a, place, h, gw, gb);
    });
  });
  end_streams();
}

template <class T>
constexpr RotaryLoops rotary_loops_for() {
  using S = typename ComputeType<T>::type;
  return {rotary_forward<S, T>, rotary_backward<S, T>};
}
CKPT_DEFINE_LOOPS(RotaryLoops, rotary_loops)

}  // namespace ckpt::CKPT_ISA
