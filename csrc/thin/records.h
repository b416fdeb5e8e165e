// Creates the recipes of blocks' outputs in the usual case of Python's `recompute.discarder.Discarder.record`.
#pragma once

#include "tensors.h"

namespace ckpt {

// Adds the functions to `_thin`; false after an error.
bool add_records(PyObject* module);

}  // namespace ckpt
