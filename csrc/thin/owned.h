// References to Python objects that are released at the end of a scope, and access to attributes and methods by name.
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
    PyObject* previous = object_;
    object_ = other.release();
    Py_XDECREF(previous);
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

// A new reference to a borrowed object, or null.
Owned shared(PyObject* object);

// The following functions return null, with an error, for null.
Owned attribute(PyObject* object, PyObject* name);
inline Owned attribute(const Owned& object, PyObject* name) { return attribute(object.get(), name); }

// The result of a method, and of a function, without arguments.
Owned called(PyObject* object, PyObject* method);
Owned called(const Owned& function);

// Whether two values, such as versions, are equal; false after an error.
inline bool are_equal(PyObject* a, PyObject* b) { return a == b || PyObject_RichCompareBool(a, b, Py_EQ) == 1; }

// Interns the names; false after an error.
bool prepare_names(std::initializer_list<std::pair<PyObject**, const char*>> names);

}  // namespace ckpt
