// Creates the cells of saved tensors in the usual cases of Python's `recompute.discarder.Discarder.pack`.
#pragma once

#include "tensors.h"

namespace ckpt {

// Whether the discarder would certainly keep the tensor; false, perhaps with an error, if that is unclear.
bool is_surely_kept(PyObject* discarder, PyObject* tensor);

// Adds the functions to `_thin`; false after an error.
bool add_cells(PyObject* module);

}  // namespace ckpt
