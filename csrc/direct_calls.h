// How the Python module `_thin` reaches the CPU ops of `_C` past torch's dispatcher: plain C types, so that the two
// libraries have to agree on nothing else.
#pragma once

#include <stdint.h>

extern "C" {

// A tensor's dtype is a ckpt::ScalarKind or one of these.
enum : int64_t { ckpt_int64 = 4, ckpt_other_dtype = -1 };

// A tensor in the CPU's memory that somebody else keeps alive.
struct CkptTensor {
  void* data;  // null where its storage has no memory
  int64_t dtype;
  int64_t dim;
  const int64_t* sizes;
  const int64_t* strides;
};

union CkptArgument {
  CkptTensor tensor;  // dim is -1 where there is none
  double real;
  int64_t integer;  // a truth value as well
};

struct CkptCall {
  const char* name;
  // A letter for each parameter: T a tensor, O one that may be missing, d a double, i an integer, b a truth value.
  const char* parameters;
  // False where the op takes no such arguments. Its results are undefined then.
  bool (*run)(const CkptArgument* arguments);
};

// The call of that name; null where there is none. `_C` exports it.
typedef const CkptCall* (*CkptFind)(const char* name);
}
