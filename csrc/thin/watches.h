// Version watches, as Python's `recompute.cells.version_watch`.
#pragma once

#include "owned.h"

namespace ckpt {

// An empty tensor that shares the version counter of a plain tensor; null after an error.
Owned version_watch(PyObject* tensor);

// Sets the function that returns an empty tensor of a dtype; false after an error.
bool make_watches_by(PyObject* nothing);

}  // namespace ckpt
