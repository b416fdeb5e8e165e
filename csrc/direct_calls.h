// The interface by which the Python module `_thin` calls the CPU ops of `_C` past torch's dispatcher. The types are
// plain C, so that the two libraries share nothing else.
#pragma once

#include <stdint.h>

extern "C" {

// A tensor's dtype is a ckpt::ScalarKind or one of these.
enum : int64_t { ckpt_int64 = 4, ckpt_other_dtype = -1 };

// A tensor in the CPU's memory, which the caller keeps alive.
struct CkptTensor {
  void* data;  // null if the storage has no memory
  int64_t dtype;
  int64_t dim;
  const int64_t* sizes;
  const int64_t* strides;
};

union CkptArgument {
  CkptTensor tensor;  // dim is -1 for None
  double real;
  int64_t integer;  // also for bool
};

struct CkptCall {
  const char* name;
  // A letter for each parameter: T a tensor, O an optional tensor, d a double, i an integer, b a bool.
  const char* parameters;
  // Returns false if the op does not accept the arguments; results are undefined then.
  bool (*run)(const CkptArgument* arguments);
};

// Returns the call with a name, or null. `_C` exports the function.
typedef const CkptCall* (*CkptFind)(const char* name);
}
