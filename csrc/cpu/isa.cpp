#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace ckpt {
namespace {

enum class Isa { generic, avx2, avx512 };

Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
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
  else
    throw std::runtime_error("CKPT_KERNELS_CPU_ISA is '" + name + "'; expected generic, avx2 or avx512");
  if (wanted > best) throw std::runtime_error("CKPT_KERNELS_CPU_ISA is '" + name + "', which this processor lacks");
  return wanted;
}

Isa chosen_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace

const char* isa_name() {
  switch (chosen_isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "generic";
  }
}

const RowNormLoops& row_norm_loops(ScalarKind kind) {
  switch (chosen_isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      return avx512::row_norm_loops(kind);
    case Isa::avx2:
      return avx2::row_norm_loops(kind);
#endif
    default:
      return generic::row_norm_loops(kind);
  }
}

}  // namespace ckpt
