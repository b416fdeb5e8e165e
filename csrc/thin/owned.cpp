#include "owned.h"

namespace ckpt {

Owned shared(PyObject* object) {
  Py_XINCREF(object);
  return Owned(object);
}

Owned attribute(PyObject* object, PyObject* name) { return Owned(object ? PyObject_GetAttr(object, name) : nullptr); }

Owned called(PyObject* object, PyObject* method) {
  return Owned(object ? PyObject_CallMethodObjArgs(object, method, nullptr) : nullptr);
}

Owned called(const Owned& function) { return Owned(function ? PyObject_CallNoArgs(function.get()) : nullptr); }

bool prepare_names(std::initializer_list<std::pair<PyObject**, const char*>> names) {
  for (const auto& [place, text] : names) {
    if (!(*place = PyUnicode_InternFromString(text))) return false;
  }
  return true;
}

}  // namespace ckpt
