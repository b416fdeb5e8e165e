// Creates the cells of saved tensors in the usual cases of Python's `recompute.discarder.Discarder.pack`.
#pragma once

#include "tensors.h"

namespace ckpt {

// Adds the functions to `_thin`; false after an error.
bool add_cells(PyObject* module);

}  // namespace ckpt
