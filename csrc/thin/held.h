// What a layer and the modules below hold, read in one walk.
#pragma once

#include "tensors.h"

namespace ckpt {

// Adds the function `held` to `_thin`; false after an error.
bool add_held(PyObject* module);

}  // namespace ckpt
