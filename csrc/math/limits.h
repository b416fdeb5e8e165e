// The limits of gate and value (OpenAI, "gpt-oss-120b & gpt-oss-20b model card", 2025), and the gradients of these
// limits. As in torch's clamp, the gradient at the limit itself is 1, and NaN stays NaN.
#pragma once

#include "macros.h"
#include "scalar.h"

namespace ckpt {

template <class T>
CKPT_HD T limited_above(T x, T limit) {
  return select(x > limit, limit, x);
}
template <class T>
CKPT_HD T limited_above_gradient(T x, T limit, T gradient) {
  return select(x > limit, T(0), gradient);
}

template <class T>
CKPT_HD T limited(T x, T limit) {
  return select(x > limit, limit, select(x < -limit, -limit, x));
}
template <class T>
CKPT_HD T limited_gradient(T x, T limit, T gradient) {
  return select(x > limit, T(0), select(x < -limit, T(0), gradient));
}

}  // namespace ckpt
