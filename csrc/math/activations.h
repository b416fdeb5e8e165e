// Every activation and its derivative, once for C++ and CUDA.
//
// T is float, double, or a vector of either (csrc/cpu/vec.h). The functions that these formulas call (exp, normal_cdf,
// ...) are those of scalar.h for numbers and of csrc/cpu/vec_math.h for vectors. To add an activation: a struct with
// `value` and `derivative`, and its line in CKPT_ACTIVATIONS, whose order is that of ckpt_kernels/activations.py.
#pragma once

#include <stdint.h>

#include "macros.h"
#include "scalar.h"

namespace ckpt {

// 1 / (1 + exp(-x)), and 1 minus that, as exp(-x) / (1 + exp(-x)): a difference would lose all digits for a large x.
template <class T>
struct Logistic {
  T value, complement;

  CKPT_HD explicit Logistic(T x) {
    T e = exp(-x);
    value = quotient(T(1), T(1) + e);
    complement = bounded(e) * value;
  }
  CKPT_HD T derivative() const { return value * complement; }
};

struct Identity {
  template <class T>
  CKPT_HD static T value(T x) {
    return x;
  }
  template <class T>
  CKPT_HD static T derivative(T) {
    return T(1);
  }
};

struct Relu {
  template <class T>
  CKPT_HD static T value(T x) {
    return select(x <= T(0), T(0), x);
  }
  template <class T>
  CKPT_HD static T derivative(T x) {
    return select(x <= T(0), T(0), T(1));
  }
};

struct LeakyRelu {
  template <class T>
  CKPT_HD static T value(T x) {
    return select(x > T(0), x, x * T(0.01));
  }
  template <class T>
  CKPT_HD static T derivative(T x) {
    return select(x > T(0), T(1), T(0.01));
  }
};

struct Relu6 {
  template <class T>
  CKPT_HD static T value(T x) {
    return select(x <= T(0), T(0), select(x >= T(6), T(6), x));
  }
  template <class T>
  CKPT_HD static T derivative(T x) {
    return select(x > T(0), select(x < T(6), T(1), T(0)), T(0));
  }
};

struct Hardtanh {
  template <class T>
  CKPT_HD static T value(T x) {
    return select(x <= T(-1), T(-1), select(x >= T(1), T(1), x));
  }
  template <class T>
  CKPT_HD static T derivative(T x) {
    return select(x > T(-1), select(x < T(1), T(1), T(0)), T(0));
  }
};

struct ReluSquared {
  template <class T>
  CKPT_HD static T value(T x) {
    T r = Relu::value(x);
    return r * r;
  }
  template <class T>
  CKPT_HD static T derivative(T x) {
    return T(2) * Relu::value(x);
  }
};

struct Elu {
  template <class T>
  CKPT_HD static T value(T x) {
    return select(x > T(0), x, expm1_nonpositive(select(x > T(0), T(0), x)));
  }
  template <class T>
  CKPT_HD static T derivative(T x) {
    return select(x > T(0), T(1), exp(select(x > T(0), T(0), x)));
  }
};

struct Gelu {
  template <class T>
  CKPT_HD static T bell(T x) {
    return exp2(T(-0.72134752044448170) * x * x);  // exp(-x * x / 2)
  }
  template <class T>
  CKPT_HD static T value(T x) {
    return x * normal_cdf(x, bell(x));
  }
  template <class T>
  CKPT_HD static T derivative(T x) {
    T b = bell(x);
    return normal_cdf(x, b) + x * (b * T(0.39894228040143268));  // 1 / sqrt(2 pi)
  }
};

// 0.5 x (1 + tanh(u)) is x * logistic(2u), which stays accurate where tanh(u) is near -1 (D. Hendrycks and K. Gimpel,
// "Gaussian error linear units", 2016).
struct GeluTanh {
  template <class T>
  CKPT_HD static Logistic<T> gate(T x) {
    return Logistic<T>(x * (T(1.5957691216057308) + T(0.07135481627260025) * x * x));  // 2 sqrt(2/pi) (1, 0.044715)
  }
  template <class T>
  CKPT_HD static T value(T x) {
    return x * gate(x).value;
  }
  template <class T>
  CKPT_HD static T derivative(T x) {
    Logistic<T> s = gate(x);
    return s.value + x * s.derivative() * (T(1.5957691216057308) + T(0.21406444881780074) * x * x);
  }
};

struct QuickGelu {
  template <class T>
  CKPT_HD static T value(T x) {
    return x * Logistic<T>(T(1.702) * x).value;
  }
  template <class T>
  CKPT_HD static T derivative(T x) {
    Logistic<T> s(T(1.702) * x);
    return s.value + x * s.derivative() * T(1.702);
  }
};

struct Silu {
  template <class T>
  CKPT_HD static T value(T x) {
    return x * Logistic<T>(x).value;
  }
  template <class T>
  CKPT_HD static T derivative(T x) {
    Logistic<T> s(x);
    return s.value + x * s.derivative();
  }
};

// x tanh(log(1 + e^x)) (D. Misra, 2019). The tanh is (w^2 - 1) / (w^2 + 1) with w = 1 + e^x, or (e^2x + 2 e^x) / (e^2x
// + 2 e^x + 2), and for a positive x that fraction divided by e^2x: only e^-|x| is computed, which cannot overflow.
struct Mish {
  template <class T>
  CKPT_HD static T value(T x) {
    T e = exp(-abs(x));
    T n = select(x >= T(0), T(1) + T(2) * e, e * (e + T(2)));
    T d = n + select(x >= T(0), T(2) * e * e, T(2));
    return x * quotient(n, d);
  }
  template <class T>
  CKPT_HD static T derivative(T x) {
    T e = exp(-abs(x));
    T n = select(x >= T(0), T(1) + T(2) * e, e * (e + T(2)));
    T rest = select(x >= T(0), T(2) * e * e, T(2));
    T t = quotient(n, n + rest);
    T one_minus_t = quotient(rest, n + rest);
    T s = quotient(select(x >= T(0), T(1), e), T(1) + e);
    return t + x * s * one_minus_t * (T(1) + t);
  }
};

struct Sigmoid {
  template <class T>
  CKPT_HD static T value(T x) {
    return Logistic<T>(x).value;
  }
  template <class T>
  CKPT_HD static T derivative(T x) {
    return Logistic<T>(x).derivative();
  }
};

struct Tanh {
  template <class T>
  CKPT_HD static T value(T x) {
    T m = expm1_nonpositive(T(-2) * abs(x));
    T t = quotient(m, m + T(2));
    return select(x > T(0), -t, t);
  }
  template <class T>
  CKPT_HD static T derivative(T x) {
    T e = exp(T(-2) * abs(x));
    T d = T(1) + e;
    return quotient(T(4) * e, d * d);
  }
};

struct Hardswish {
  template <class T>
  CKPT_HD static T value(T x) {
    T ramp = x + T(3);
    ramp = select(ramp <= T(0), T(0), ramp);
    ramp = select(ramp >= T(6), T(6), ramp);
    return x * (ramp * T(1.0 / 6));
  }
  template <class T>
  CKPT_HD static T derivative(T x) {
    T inner = select(x >= T(3), T(1), quotient(x, T(3)) + T(0.5));
    return select(x <= T(-3), T(0), inner);
  }
};

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|). As in torch, the identity above 20.
struct Softplus {
  template <class T>
  CKPT_HD static T value(T x) {
    T e = exp(-abs(x));
    return select(x > T(20), x, select(x > T(0), x, T(0)) + log1p_unit(e));
  }
  template <class T>
  CKPT_HD static T derivative(T x) {
    return select(x > T(20), T(1), Logistic<T>(x).value);
  }
};

#define CKPT_ACTIVATIONS(X) \
  X(0, Identity)            \
  X(1, Relu)                \
  X(2, LeakyRelu)           \
  X(3, ReluSquared)         \
  X(4, Elu)                 \
  X(5, Gelu)                \
  X(6, GeluTanh)            \
  X(7, QuickGelu)           \
  X(8, Silu)                \
  X(9, Mish)                \
  X(10, Sigmoid)            \
  X(11, Tanh)               \
  X(12, Hardswish)          \
  X(13, Softplus)           \
  X(14, Relu6)              \
  X(15, Hardtanh)

// Calls `visitor(Struct{})` for the activation with this code. The ops have checked the code.
template <class Visitor>
CKPT_HD void visit_activation(int activation, Visitor visitor) {
#define CKPT_VISIT(code, name) \
  case code:                   \
    visitor(name{});           \
    break;
  switch (activation) {
    CKPT_ACTIVATIONS(CKPT_VISIT)
    default:
      break;
  }
#undef CKPT_VISIT
}

}  // namespace ckpt
