#include "slots.h"

namespace ckpt {

namespace {

// The offset of the slot that holds the marker in an object of `size` bytes; 0 unless exactly one word does.
Py_ssize_t offset_of(PyObject* marker, PyObject* object, Py_ssize_t size) {
  const char* bytes = reinterpret_cast<const char*>(object);
  Py_ssize_t found = 0;
  for (Py_ssize_t at = sizeof(PyObject); at + Py_ssize_t(sizeof(PyObject*)) <= size; at += sizeof(PyObject*)) {
    if (*reinterpret_cast<PyObject* const*>(bytes + at) != marker) continue;
    if (found) return 0;
    found = at;
  }
  return found;
}

}  // namespace

bool find_slots(PyObject* type, std::initializer_list<std::pair<Slot*, const char*>> slots) {
  if (!PyType_Check(type)) return PyErr_Format(PyExc_TypeError, "expected a class") != nullptr;
  const Owned size(PyObject_GetAttrString(type, "__basicsize__")), marker(PyList_New(0));
  const Owned object(size && marker ? PyType_GenericAlloc(reinterpret_cast<PyTypeObject*>(type), 0) : nullptr);
  if (!object) return false;
  for (const auto& [slot, name] : slots) {
    if (PyObject_SetAttrString(object.get(), name, marker.get()) != 0) return false;
    slot->offset_ = offset_of(marker.get(), object.get(), PyLong_AsSsize_t(size.get()));
    if (!slot->offset_) return PyErr_Format(PyExc_TypeError, "the class has no slot %s", name) != nullptr;
    if (PyObject_DelAttrString(object.get(), name) != 0) return false;
  }
  return true;
}

}  // namespace ckpt
