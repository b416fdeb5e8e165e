// The checks of code, modules and tensors before each fused call, as Python has them in `convert/native_guards.py`.
#pragma once

#include "tensors.h"

namespace ckpt {

// Adds the functions to `_thin`; false after an error.
bool add_guards(PyObject* module);

}  // namespace ckpt
