// All checks at one call site of a converted model, in one call.
#pragma once

#include "tensors.h"

namespace ckpt {

// operands(quiet, owner, linear, activations, wanted, *values): what Python's `native_guards.SiteGuard` says.
PyObject* operands(PyObject* self, PyObject* const* objects, Py_ssize_t count);

// Interns the names; false after an error.
bool prepare_sites();

}  // namespace ckpt
