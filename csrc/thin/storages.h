// `StorageReference`, a weak reference to a tensor's storage.
#pragma once

#include "owned.h"

namespace ckpt {

// A new weak reference to the storage of a tensor; null after an error.
Owned reference_to_storage(PyObject* tensor);

// The address of the storage, borrowed.
PyObject* address_in(const Owned& reference);

// Adds the type and the function that sets it up to `_thin`; false after an error.
bool add_storages(PyObject* module);

}  // namespace ckpt
