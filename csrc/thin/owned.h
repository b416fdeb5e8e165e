// A reference to a Python object that is given back at the end of a scope.
#pragma once

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

}  // namespace ckpt
