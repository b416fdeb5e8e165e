// Objects of Python's classes, made without their __init__.
#pragma once

#include "owned.h"

namespace ckpt {

// An object of one of Python's classes that have slots, with these values in them; null after an error.
inline Owned made(PyTypeObject* type, std::initializer_list<std::pair<PyObject*, PyObject*>> values) {
  Owned object(PyType_GenericAlloc(type, 0));
  for (const auto& [name, value] : values) {
    if (!object || PyObject_SetAttr(object.get(), name, value) != 0) return Owned();
  }
  return object;
}

}  // namespace ckpt
