// The table of CPU ops by name, for calls past torch's dispatcher.
#include <cstring>

#include "device.h"

namespace ckpt {
namespace {

constexpr int most = 64;
struct Calls {
  CkptCall calls[most];
  int count;
};

// The families register themselves while the library loads, in no defined order; hence a function-local static.
Calls& calls() {
  static Calls all;
  return all;
}

}  // namespace

void add_direct_call(const CkptCall& call) {
  STD_TORCH_CHECK(calls().count < most, "expected at most ", most, " ops");
  calls().calls[calls().count++] = call;
}

}  // namespace ckpt

extern "C" __attribute__((visibility("default"))) const CkptCall* ckpt_kernels_find_call(const char* name) {
  for (int i = 0; i < ckpt::calls().count; ++i)
    if (std::strcmp(ckpt::calls().calls[i].name, name) == 0) return &ckpt::calls().calls[i];
  return nullptr;
}
