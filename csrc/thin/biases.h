// Which biases of a module there are when its forward begins, as Python's `recompute.biases` finds them.
#pragma once

#include "tensors.h"

namespace ckpt {

// Adds the function to `_thin`; false after an error.
bool add_biases(PyObject* module);

}  // namespace ckpt
