#include "cells.h"

#include "owned.h"
#include "questions.h"

namespace ckpt {

namespace {

// Python's classes of what is made here, and torch's layout of dense tensors.
PyTypeObject *cell_type = nullptr, *kept_type = nullptr;
PyObject* strided = nullptr;

// Names of attributes and methods.
struct Names {
  PyObject *announced, *attached, *base, *cdata, *content, *detach, *entries, *get, *grad_fn, *held, *is_apart,
      *is_clone, *is_closed, *is_leaf, *is_paused, *is_plain, *kept, *layout, *may_be_sharded, *name, *outer, *owner,
      *pack, *rules, *saved, *tensor, *total, *untyped_storage, *version, *version_of_tensor, *watch;

  bool prepare() {
    const struct {
      PyObject** place;
      const char* text;
    } all[] = {{&announced, "announced"},
               {&attached, "attached"},
               {&base, "_base"},
               {&cdata, "_cdata"},
               {&content, "content"},
               {&detach, "detach"},
               {&entries, "entries"},
               {&get, "get"},
               {&grad_fn, "grad_fn"},
               {&held, "held"},
               {&is_apart, "is_apart"},
               {&is_clone, "is_clone"},
               {&is_closed, "is_closed"},
               {&is_leaf, "is_leaf"},
               {&is_paused, "is_paused"},
               {&is_plain, "is_plain"},
               {&kept, "kept"},
               {&layout, "layout"},
               {&may_be_sharded, "may_be_sharded"},
               {&name, "name"},
               {&outer, "outer"},
               {&owner, "owner"},
               {&pack, "pack"},
               {&rules, "rules"},
               {&saved, "saved"},
               {&tensor, "tensor"},
               {&total, "total"},
               {&untyped_storage, "untyped_storage"},
               {&version, "version"},
               {&version_of_tensor, "_version"},
               {&watch, "watch"}};
    for (const auto& each : all) {
      if (!(*each.place = PyUnicode_InternFromString(each.text))) return false;
    }
    return true;
  }
} names;

Owned attribute(PyObject* object, PyObject* name) { return Owned(PyObject_GetAttr(object, name)); }
Owned attribute(const Owned& object, PyObject* name) { return attribute(object.get(), name); }

Owned called(PyObject* object, PyObject* method) {
  return Owned(PyObject_CallMethodObjArgs(object, method, nullptr));
}

// An object of one of Python's classes that have slots, with these values in them; null after an error.
Owned made(PyTypeObject* type, std::initializer_list<std::pair<PyObject*, PyObject*>> values) {
  Owned object(PyType_GenericAlloc(type, 0));
  for (const auto& [name, value] : values) {
    if (!object || PyObject_SetAttr(object.get(), name, value) != 0) return Owned();
  }
  return object;
}

// What is packed for one node, and the state of the context that packs it. Each question is answered no, perhaps with an
// error, where Python is to be asked.
class Packing {
 public:
  Packing(PyObject* discarder, PyObject* tensor) : discarder_(discarder), tensor_(tensor) {}

  // A cell that holds the tensor itself; null, perhaps with an error, where it may hold something else.
  Owned cell() {
    if (!is_usual() || !is_surely_kept()) return Owned();
    const Owned kept_tensor = called(tensor_, names.detach);
    const Owned version = attribute(tensor_, names.version_of_tensor);
    if (!kept_tensor || !version) return Owned();
    const Owned kept = made(
        kept_type, {{names.tensor, kept_tensor.get()}, {names.version, version.get()}, {names.is_plain, Py_True}});
    if (!kept) return Owned();
    Owned cell = made(cell_type, {{names.content, kept.get()},
                                  {names.owner, discarder_},
                                  {names.version, version.get()},
                                  {names.watch, kept_tensor.get()},
                                  {names.is_clone, Py_False},
                                  {names.attached, Py_None}});
    return cell && is_noted(kept, cell) ? std::move(cell) : Owned();
  }

 private:
  bool has(PyObject* name, PyObject* value) const { return attribute(discarder_, name).is(value); }

  // Whether it is a dense tensor and no subclass, no hooks are around, and no layer is.
  bool is_usual() {
    if (!is_tensor_type(Py_TYPE(tensor_)) || !attribute(tensor_, names.layout).is(strided)) return false;
    if (!has(names.is_closed, Py_False) || !has(names.outer, Py_None)) return false;
    const Owned held = attribute(discarder_, names.held);
    if (!held || !PyDict_CheckExact(held.get()) || PyDict_Size(held.get()) != 0) return false;
    announced_ = attribute(discarder_, names.announced);
    return announced_ && (announced_.is(Py_None) || attribute(announced_, names.total).is(Py_None));
  }

  // Whether no recipe can be found for it: nothing made the tensor, nor what it is a view of, or what made that is no
  // block, and no rule says how it is made again.
  bool is_surely_kept() const {
    const Owned base = attribute(tensor_, names.base);
    if (!base) return false;
    PyObject* root = base.is(Py_None) ? tensor_ : base.get();
    const Owned is_leaf = attribute(root, names.is_leaf);
    if (!is_leaf.is(Py_False)) return is_leaf.is(Py_True);
    const Owned storage = called(tensor_, names.untyped_storage);
    const Owned address = storage ? attribute(storage, names.cdata) : Owned();
    const Owned entries = address ? attribute(discarder_, names.entries) : Owned();
    if (!entries || !has_none(entries, address)) return false;
    const Owned node = attribute(root, names.grad_fn);
    const Owned name = node && !node.is(Py_None) ? called(node.get(), names.name) : Owned();
    const Owned rules = name ? attribute(discarder_, names.rules) : Owned();
    return rules && has_none(rules, name);
  }

  static bool has_none(const Owned& dict, const Owned& key) {
    return PyDict_CheckExact(dict.get()) && !PyDict_GetItemWithError(dict.get(), key.get()) && !PyErr_Occurred();
  }

  // Tells the op whose forward has run, if there is one; false after an error.
  bool is_noted(const Owned& kept, const Owned& cell) const {
    if (announced_.is(Py_None) || has(names.is_apart, Py_True)) return !PyErr_Occurred();
    const Owned identity(PyLong_FromVoidPtr(tensor_));
    const Owned packed(PyTuple_Pack(3, tensor_, cell.get(), Py_False));
    const Owned saved = attribute(announced_, names.saved);
    if (!identity || !packed || !saved || PyObject_SetItem(saved.get(), identity.get(), packed.get()) != 0) return false;
    if (!has(names.may_be_sharded, Py_False)) return !PyErr_Occurred();
    const Owned all_kept = attribute(announced_, names.kept);
    return all_kept && PyObject_SetItem(all_kept.get(), identity.get(), kept.get()) == 0;
  }

  PyObject *discarder_, *tensor_;
  Owned announced_;
};

PyObject* pack(PyObject* discarder, PyObject* tensor) {
  Owned cell = Packing(discarder, tensor).cell();
  if (cell) return cell.release();
  // An exception on the way is met again in Python.
  if (PyErr_Occurred() && no_if_exception() == failed) return nullptr;
  return PyObject_CallMethodObjArgs(discarder, names.pack, tensor, nullptr);
}

// The tensor that is kept, if there is one to which nobody has written, and which has memory; null, perhaps with an
// error, where Python is to be asked.
Owned kept_tensor(PyObject* kept) {
  if (Py_TYPE(kept) != kept_type || !attribute(kept, names.is_plain).is(Py_True)) return Owned();
  Owned tensor = attribute(kept, names.tensor);
  const Owned version = tensor ? attribute(kept, names.version) : Owned();
  const Owned now = version ? attribute(tensor, names.version_of_tensor) : Owned();
  if (!now || PyObject_RichCompareBool(now.get(), version.get(), Py_EQ) != 1) return Owned();
  DLTensor described;
  return describe(tensor.get(), &described) == yes && described.data ? std::move(tensor) : Owned();
}

// Of any content of a cell.
Owned tensor_of(PyObject* content) {
  Owned tensor = kept_tensor(content);
  if (tensor) return tensor;
  if (PyErr_Occurred() && no_if_exception() == failed) return tensor;
  return called(content, names.get);
}

PyObject* unpack(PyObject*, PyObject* cell) {
  const Owned content = attribute(cell, names.content);
  return content ? tensor_of(content.get()).release() : nullptr;
}

PyObject* tensors(PyObject*, PyObject* operands) {
  const Py_ssize_t count = PySequence_Size(operands);
  Owned found(count < 0 ? nullptr : PyTuple_New(count));
  for (Py_ssize_t i = 0; found && i < count; ++i) {
    Owned operand(PySequence_GetItem(operands, i));
    if (!operand) return nullptr;
    if (!operand.is(Py_None)) operand = tensor_of(operand.get());
    if (!operand || PyTuple_SetItem(found.get(), i, operand.release()) != 0) return nullptr;
  }
  return found.release();
}

PyMethodDef pack_definition = {"pack", pack, METH_O, "Discarder.pack, which it calls where more than a tensor may be kept."};

PyObject* packer(PyObject*, PyObject* discarder) { return PyCFunction_New(&pack_definition, discarder); }

PyObject* set_up_cells(PyObject*, PyObject* arguments) {
  PyObject *cell, *kept, *layout;
  if (!PyArg_ParseTuple(arguments, "O!O!O", &PyType_Type, &cell, &PyType_Type, &kept, &layout)) return nullptr;
  Py_INCREF(cell);
  Py_INCREF(kept);
  Py_INCREF(layout);
  cell_type = reinterpret_cast<PyTypeObject*>(cell);
  kept_type = reinterpret_cast<PyTypeObject*>(kept);
  strided = layout;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"set_up_cells", set_up_cells, METH_VARARGS,
     "set_up_cells(cell, kept, layout): the classes of what is made here, and the layout of dense tensors."},
    {"packer", packer, METH_O, "packer(discarder): its hook `pack`."},
    {"unpack", unpack, METH_O, "unpack(cell): the tensor that a cell stands for."},
    {"tensors", tensors, METH_O, "tensors(operands): those of a recipe, as a tuple; None stays None."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_cells(PyObject* module) { return names.prepare() && PyModule_AddFunctions(module, methods) == 0; }

}  // namespace ckpt
