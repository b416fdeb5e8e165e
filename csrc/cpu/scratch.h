// Temporary memory for the duration of a call.
#pragma once

#include "../operands.h"

namespace ckpt {

inline int64_t compute_size(ScalarKind kind) { return kind == ScalarKind::float64 ? 8 : 4; }

// Uninitialised memory: up to 2048 bytes in the object itself, more from torch's allocator, so that torch's profiler
// sees them.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes <= int64_t(sizeof(near_))) return;
    const int64_t stride = 1;
    AtenTensorHandle handle;
    STD_TORCH_CHECK(aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(),
                                             0, &handle) == AOTI_TORCH_SUCCESS,
                    "out of memory: torch's CPU allocator has not the ", bytes,
                    " bytes of scratch that this call takes");
    tensor_ = Tensor(handle);
    data_ = static_cast<char*>(tensor_->data_ptr());
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  char* data() const { return data_; }
  template <class S>
  S* as() const {
    return reinterpret_cast<S*>(data_);
  }

 private:
  alignas(64) char near_[2048];
  char* data_ = near_;
  OptionalTensor tensor_;
};

}  // namespace ckpt
