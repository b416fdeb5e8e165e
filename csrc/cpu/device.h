// Registers the CPU ops for two kinds of calls: by torch's dispatcher, and by name past the dispatcher (see
// direct_calls.h). One function serves both.
#pragma once

#include <exception>

#include "view.h"

namespace ckpt {

void add_direct_call(const CkptCall& call);

// A parameter of an op: the type that the dispatcher passes, the letter, and the conversions from both kinds of calls.
template <class P>
struct Parameter {  // double, int64_t, bool
  using Given = P;
  static constexpr char letter = std::is_same_v<P, double> ? 'd' : std::is_same_v<P, bool> ? 'b' : 'i';
  static P of(P given) { return given; }
  static P of(const CkptArgument& argument) {
    if constexpr (std::is_same_v<P, double>) return argument.real;
    return P(argument.integer);
  }
};
template <>
struct Parameter<View> {
  using Given = Tensor;
  static constexpr char letter = 'T';
  static View of(const Tensor& given) { return View(given); }
  static View of(const CkptArgument& argument) { return View(argument.tensor); }
};
template <>
struct Parameter<std::optional<View>> {
  using Given = OptionalTensor;
  static constexpr char letter = 'O';
  static std::optional<View> of(const OptionalTensor& given) {
    return given ? std::optional<View>(*given) : std::nullopt;
  }
  static std::optional<View> of(const CkptArgument& argument) {
    return argument.tensor.dim < 0 ? std::nullopt : std::optional<View>(argument.tensor);
  }
};

template <auto function, class Signature = decltype(function)>
struct Call;
template <auto function, class... P>
struct Call<function, void (*)(P...)> {
  static constexpr char parameters[] = {Parameter<P>::letter..., 0};

  static void from_dispatcher(typename Parameter<P>::Given... given) { function(Parameter<P>::of(given)...); }

  static bool direct(const CkptArgument* arguments) {
    try {
      run(arguments, std::index_sequence_for<P...>());
      return true;
    } catch (const std::exception&) {
      return false;
    }
  }

 private:
  template <size_t... I>
  static void run(const CkptArgument* arguments, std::index_sequence<I...>) {
    function(Parameter<P>::of(arguments[I])...);
  }
};

template <auto function>
void add_direct(const char* name) {
  add_direct_call({name, Call<function>::parameters, &Call<function>::direct});
}

// The part of Device that all families share.
struct CpuDevice {
  using Tensor = View;

  template <auto function, class Library>
  static void add(Library& m, const char* name) {
    m.impl(name, TORCH_BOX(&Call<function>::from_dispatcher));
    add_direct<function>(name);
  }
};

}  // namespace ckpt
