// Lists the biases of a module at the start of a forward pass, as Python's `recompute.biases` does.
#pragma once

#include "tensors.h"

namespace ckpt {

// Adds the function to `_thin`; false after an error.
bool add_biases(PyObject* module);

}  // namespace ckpt
