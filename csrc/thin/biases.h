// Lists the biases of a module when its forward pass begins, as Python's `recompute.biases` does.
#pragma once

#include "tensors.h"

namespace ckpt {

// Adds the function to `_thin`; false after an error.
bool add_biases(PyObject* module);

}  // namespace ckpt
