// References to Python objects that are given back at the end of a scope, and what is asked of objects by names.
#pragma once

#include <initializer_list>
#include <utility>

#include "tensors.h"

namespace ckpt {

class Owned {
 public:
  explicit Owned(PyObject* object = nullptr) : object_(object) {}
  Owned(Owned&& other) : object_(other.release()) {}
  ~Owned() { Py_XDECREF(object_); }
  Owned& operator=(Owned&& other) {
    PyObject* before = object_;
    object_ = other.release();
    Py_XDECREF(before);
    return *this;
  }

  PyObject* get() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }
  bool is(PyObject* object) const { return object_ == object; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_;
};

// Of an object that is borrowed, or null.
inline Owned shared(PyObject* object) {
  Py_XINCREF(object);
  return Owned(object);
}

// The following are null, with an error, of null.
inline Owned attribute(PyObject* object, PyObject* name) {
  return Owned(object ? PyObject_GetAttr(object, name) : nullptr);
}
inline Owned attribute(const Owned& object, PyObject* name) { return attribute(object.get(), name); }

// What a method gives that is called with nothing, and what a function gives.
inline Owned called(PyObject* object, PyObject* method) {
  return Owned(object ? PyObject_CallMethodObjArgs(object, method, nullptr) : nullptr);
}
inline Owned called(const Owned& function) { return Owned(function ? PyObject_CallNoArgs(function.get()) : nullptr); }

// Makes the names that are asked for; false after an error.
inline bool prepare_names(std::initializer_list<std::pair<PyObject**, const char*>> names) {
  for (const auto& [place, text] : names) {
    if (!(*place = PyUnicode_InternFromString(text))) return false;
  }
  return true;
}

}  // namespace ckpt
