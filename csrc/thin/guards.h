// What is asked of code, modules and tensors at each call of a converted model, as Python's `convert/asked.py` asks it.
#pragma once

#include "tensors.h"

namespace ckpt {

// Adds the questions to `_thin`; false after an error.
bool add_guards(PyObject* module);

}  // namespace ckpt
