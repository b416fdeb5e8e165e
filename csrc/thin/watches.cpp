#include "watches.h"

#include "members.h"

namespace ckpt {

namespace {

PyObject *empty_of = nullptr, *of_data = nullptr;

}  // namespace

Owned version_watch(PyObject* tensor) {
  Owned watch = tensor_members.detach.of(tensor);
  const Owned dtype = tensor_members.dtype.of(watch);
  const Owned empty(dtype ? PyObject_CallFunctionObjArgs(empty_of, dtype.get(), nullptr) : nullptr);
  return empty && PyObject_SetAttr(watch.get(), of_data, empty.get()) == 0 ? std::move(watch) : Owned();
}

bool make_watches_by(PyObject* nothing) {
  Py_INCREF(nothing);
  empty_of = nothing;
  return prepare_names({{&of_data, "data"}});
}

}  // namespace ckpt
