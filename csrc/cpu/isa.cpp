#include "isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace ckpt {
namespace {

enum class Isa { generic, avx2, avx512, avx512_bf16 };

Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::generic;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* forced = std::getenv("CKPT_KERNELS_CPU_ISA");
  if (!forced || !*forced) return best;
  const std::string name = forced;
  Isa wanted;
  if (name == "generic")
    wanted = Isa::generic;
  else if (name == "avx2")
    wanted = Isa::avx2;
  else if (name == "avx512")
    wanted = Isa::avx512;
  else if (name == "avx512_bf16")
    wanted = Isa::avx512_bf16;
  else
    throw std::runtime_error("CKPT_KERNELS_CPU_ISA is '" + name + "'; expected generic, avx2, avx512 or avx512_bf16");
  if (wanted > best) throw std::runtime_error("CKPT_KERNELS_CPU_ISA is '" + name + "', which this processor lacks");
  return wanted;
}

Isa chosen_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace

#if defined(__x86_64__)
#define CKPT_CHOOSE(Loops, name)        \
  const Loops& name(ScalarKind kind) {  \
    switch (chosen_isa()) {             \
      case Isa::avx512_bf16:            \
        return avx512_bf16::name(kind); \
      case Isa::avx512:                 \
        return avx512::name(kind);      \
      case Isa::avx2:                   \
        return avx2::name(kind);        \
      default:                          \
        return generic::name(kind);     \
    }                                   \
  }
#else
#define CKPT_CHOOSE(Loops, name) \
  const Loops& name(ScalarKind kind) { return generic::name(kind); }
#endif
CKPT_LOOPS(CKPT_CHOOSE)

namespace {

std::string cpu_isa() {
  switch (chosen_isa()) {
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "generic";
  }
}

}  // namespace
}  // namespace ckpt

STABLE_TORCH_LIBRARY_IMPL(ckpt_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&ckpt::cpu_isa));
}
