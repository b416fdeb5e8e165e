// Classes whose objects the cyclic garbage collector does not know.
#pragma once

#include "owned.h"

namespace ckpt {

// Adds the function `untracked` to `_thin`; false after an error.
bool add_untracked(PyObject* module);

}  // namespace ckpt
