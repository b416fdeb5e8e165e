// Mean and sum of squared deviations, merged pairwise (T. Chan, G. Golub and R. LeVeque, "Algorithms for computing the
// sample variance", 1983). Accurate for large means with small deviations, where E[x^2] - E[x]^2 would cancel.
#pragma once

#include "macros.h"

namespace ckpt {

struct Moments {
  float count = 0, mean = 0, squares = 0;

  // The moments of n values, in two passes over them.
  CKPT_HD static Moments of(const float* values, int n) {
    Moments m;
    for (int i = 0; i < n; ++i) m.mean += values[i];
    m.mean /= float(n);
    for (int i = 0; i < n; ++i) m.squares += (values[i] - m.mean) * (values[i] - m.mean);
    m.count = float(n);
    return m;
  }

  CKPT_HD void merge(const Moments& other) {
    const float total = count + other.count;
    if (total == 0) return;
    const float share = other.count / total, delta = other.mean - mean;
    mean += delta * share;
    squares += other.squares + delta * delta * count * share;
    count = total;
  }
};

}  // namespace ckpt
