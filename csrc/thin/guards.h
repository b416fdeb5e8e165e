// The checks of code, modules and tensors at each call of a converted model, as in Python's `convert/asked.py`.
#pragma once

#include "tensors.h"

namespace ckpt {

// Adds the functions to `_thin`; false after an error.
bool add_guards(PyObject* module);

}  // namespace ckpt
