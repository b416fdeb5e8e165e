#include "storages.h"

#include <structmember.h>

#include <cstddef>

#include "members.h"

namespace ckpt {

namespace {

// Functions of torch that tell whether the storage at an address is gone, and that drop a weak reference to it.
PyObject *is_gone = nullptr, *drop = nullptr;
PyTypeObject* type = nullptr;
PyObject* of_weak_reference;

struct StorageReference {
  PyObject_HEAD PyObject* cdata;
};

PyObject* expired(PyObject* self, PyObject*) {
  return PyObject_CallFunctionObjArgs(is_gone, reinterpret_cast<StorageReference*>(self)->cdata, nullptr);
}

void deallocate(PyObject* self) {
  PyObject* address = reinterpret_cast<StorageReference*>(self)->cdata;
  if (address) {
    PyObject *kind, *value, *trace;
    PyErr_Fetch(&kind, &value, &trace);
    const Owned dropped(PyObject_CallFunctionObjArgs(drop, address, nullptr));
    if (!dropped) PyErr_WriteUnraisable(drop);
    PyErr_Restore(kind, value, trace);
    Py_DECREF(address);
  }
  PyTypeObject* own_type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(own_type, Py_tp_free))(self);
  Py_DECREF(own_type);
}

PyMethodDef methods[] = {
    {"expired", expired, METH_NOARGS, "expired(): whether the storage is gone."},
    {nullptr, nullptr, 0, nullptr},
};
PyMemberDef members[] = {
    {"cdata", T_OBJECT_EX, offsetof(StorageReference, cdata), READONLY, "The address of the storage."},
    {nullptr, 0, 0, 0, nullptr},
};
PyType_Slot slots[] = {
    {Py_tp_doc, const_cast<char*>("A weak reference to a storage. While it exists, no other storage has the address.")},
    {Py_tp_dealloc, reinterpret_cast<void*>(deallocate)},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {0, nullptr},
};
PyType_Spec specification = {"ckpt_kernels._thin.StorageReference", sizeof(StorageReference), 0, Py_TPFLAGS_DEFAULT,
                             slots};

PyObject* set_up_storages(PyObject*, PyObject* arguments) {
  if (!PyArg_ParseTuple(arguments, "OO", &is_gone, &drop)) return nullptr;
  Py_INCREF(is_gone);
  Py_INCREF(drop);
  Py_RETURN_NONE;
}

PyObject* refer(PyObject*, PyObject* tensor) { return reference_to_storage(tensor).release(); }

PyMethodDef functions[] = {
    {"set_up_storages", set_up_storages, METH_VARARGS,
     "set_up_storages(is_gone, drop): two functions of the address of a storage that has weak references."},
    {"storage_reference", refer, METH_O, "storage_reference(tensor): a weak reference to the tensor's storage."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

Owned reference_to_storage(PyObject* tensor) {
  const Owned storage = tensor_members.untyped_storage.of(tensor);
  Owned address = storage ? called(storage.get(), of_weak_reference) : Owned();
  Owned reference(address ? PyType_GenericAlloc(type, 0) : nullptr);
  if (reference) reinterpret_cast<StorageReference*>(reference.get())->cdata = address.release();
  return reference;
}

PyObject* address_in(const Owned& reference) { return reinterpret_cast<StorageReference*>(reference.get())->cdata; }

bool add_storages(PyObject* module) {
  type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&specification));
  return type && prepare_names({{&of_weak_reference, "_weak_ref"}}) && PyModule_AddFunctions(module, functions) == 0;
}

}  // namespace ckpt
