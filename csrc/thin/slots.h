// Slots of Python classes (`__slots__`), read and written without a lookup by name. All objects of a class have a slot
// at the same offset, which `find_slots` finds by storing a marker in an object.
#pragma once

#include <initializer_list>
#include <utility>

#include "owned.h"

namespace ckpt {

class Slot {
 public:
  // The value, borrowed; null if there is none.
  PyObject* of(PyObject* object) const { return *place(object); }
  bool is(PyObject* object, PyObject* value) const { return of(object) == value; }

  // Stores a new reference to the value.
  void set(PyObject* object, PyObject* value) const {
    Py_INCREF(value);
    take(object, value);
  }

  // Stores the given reference.
  void take(PyObject* object, PyObject* value) const {
    PyObject* previous = of(object);
    *place(object) = value;
    Py_XDECREF(previous);
  }

 private:
  friend bool find_slots(PyObject* type, std::initializer_list<std::pair<Slot*, const char*>> slots);
  PyObject** place(PyObject* object) const {
    return reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_);
  }
  Py_ssize_t offset_ = 0;
};

// False, with an error, if `type` is no class with these slots.
bool find_slots(PyObject* type, std::initializer_list<std::pair<Slot*, const char*>> slots);

// The base of a struct with the slots of one class.
struct Slotted {
  PyTypeObject* type = nullptr;

  bool is_type_of(PyObject* object) const { return Py_TYPE(object) == type; }
  // An object created without __init__, whose slots have no values yet; null after an error.
  Owned object() const { return Owned(PyType_GenericAlloc(type, 0)); }

 protected:
  // Keeps the class as long as the process lives.
  bool find(PyObject* of, std::initializer_list<std::pair<Slot*, const char*>> slots) {
    if (!find_slots(of, slots)) return false;
    Py_INCREF(of);
    type = reinterpret_cast<PyTypeObject*>(of);
    return true;
  }
};

}  // namespace ckpt
