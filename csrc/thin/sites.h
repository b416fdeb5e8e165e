// All that is asked at a site of a converted model, in one call.
#pragma once

#include "tensors.h"

namespace ckpt {

// operands(quiet, owner, linear, activations, wanted, *values): what Python's `native_guards.SiteGuard` says.
PyObject* operands(PyObject* self, PyObject* const* objects, Py_ssize_t count);

// False after an error.
bool prepare_sites();

}  // namespace ckpt
