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
Owned shared(PyObject* object);

// The following are null, with an error, of null.
Owned attribute(PyObject* object, PyObject* name);
inline Owned attribute(const Owned& object, PyObject* name) { return attribute(object.get(), name); }

// What a method gives that is called with nothing, and what a function gives.
Owned called(PyObject* object, PyObject* method);
Owned called(const Owned& function);

// An object of one of Python's classes that have slots, made without its __init__, with these values in them; null
// after an error.
Owned made(PyTypeObject* type, std::initializer_list<std::pair<PyObject*, PyObject*>> values);

// Makes the names that are asked for; false after an error.
bool prepare_names(std::initializer_list<std::pair<PyObject**, const char*>> names);

}  // namespace ckpt
