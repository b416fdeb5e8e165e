#include "members.h"

namespace ckpt {

TensorMembers tensor_members;

bool TensorAttribute::find(PyTypeObject* type, const char* name) {
  descriptor_ = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), name);
  if (!descriptor_) return false;
  get_ = reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(descriptor_), Py_tp_descr_get));
  return get_ || PyErr_Format(PyExc_TypeError, "%s is no attribute of tensors", name);
}

bool TensorMethod::find(PyTypeObject* type, const char* name) {
  function_ = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), name);
  return function_ != nullptr;
}

bool TensorMembers::find(PyTypeObject* type) {
  return base.find(type, "_base") && dtype.find(type, "dtype") && grad_fn.find(type, "grad_fn") &&
         is_leaf.find(type, "is_leaf") && is_nested.find(type, "is_nested") && layout.find(type, "layout") &&
         requires_grad.find(type, "requires_grad") && version.find(type, "_version") && detach.find(type, "detach") &&
         is_neg.find(type, "is_neg") && size.find(type, "size") && storage_offset.find(type, "storage_offset") &&
         stride.find(type, "stride") && untyped_storage.find(type, "untyped_storage");
}

}  // namespace ckpt
