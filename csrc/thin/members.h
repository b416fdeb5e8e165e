// Attributes and methods of torch's tensors, found once in the class, so that reading one looks up no name.
#pragma once

#include "owned.h"

namespace ckpt {

// The following two may be used for objects for which `is_tensor_type` holds.
class TensorAttribute {
 public:
  // The value; null after an error.
  Owned of(PyObject* tensor) const {
    return Owned(tensor ? get_(descriptor_, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor))) : nullptr);
  }
  Owned of(const Owned& tensor) const { return of(tensor.get()); }
  // False after an error.
  bool find(PyTypeObject* type, const char* name);

 private:
  PyObject* descriptor_ = nullptr;
  descrgetfunc get_ = nullptr;
};

class TensorMethod {
 public:
  // The result without arguments; null after an error.
  Owned of(PyObject* tensor) const {
    return Owned(tensor ? PyObject_CallFunctionObjArgs(function_, tensor, nullptr) : nullptr);
  }
  Owned of(const Owned& tensor) const { return of(tensor.get()); }
  bool find(PyTypeObject* type, const char* name);

 private:
  PyObject* function_ = nullptr;
};

struct TensorMembers {
  TensorAttribute base, dtype, grad_fn, is_leaf, is_nested, layout, requires_grad, version;
  TensorMethod detach, is_neg, size, storage_offset, stride, untyped_storage;

  // Finds all in torch's class; false after an error.
  bool find(PyTypeObject* type);
};
extern TensorMembers tensor_members;

}  // namespace ckpt
