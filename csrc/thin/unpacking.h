// Unpacks cells in the usual cases of Python's `recompute.contexts._unpack`.
#pragma once

#include "tensors.h"

namespace ckpt {

// Adds the functions to `_thin`; false after an error.
bool add_unpacking(PyObject* module);

}  // namespace ckpt
