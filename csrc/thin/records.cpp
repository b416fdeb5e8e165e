#include "records.h"

#include "cells.h"
#include "classes.h"
#include "members.h"
#include "questions.h"
#include "storages.h"
#include "watches.h"

namespace ckpt {

namespace {

// The contexts of each thread, and the function that returns the innermost hooks of this thread.
PyObject *thread = nullptr, *top_hooks = nullptr;
// Functions that return the chosen backend, and a new lock.
PyObject *chosen = nullptr, *lock = nullptr;
PyObject* one = nullptr;

PyObject *of_active, *of_add, *of_cdata, *of_recomputed_block, *of_sweep_size;

// The innermost context of this thread: None if there is none; null, perhaps with an error, if Python must look.
Owned innermost() {
  const Owned active = attribute(thread, of_active);
  if (!active || !PyList_CheckExact(active.get())) return Owned();
  const Py_ssize_t count = PyList_Size(active.get());
  if (count == 0) return shared(Py_None);
  Owned last = shared(PyList_GetItem(active.get(), count - 1));
  const bool is_open = classes.discarder.is_type_of(last.get()) && classes.discarder.is_closed.is(last.get(), Py_False);
  return is_open ? std::move(last) : Owned();
}

// Whether the hooks of this context are certainly the innermost on this thread.
bool has_innermost_hooks(const Owned& discarder) {
  const Owned hooks(PyObject_CallFunctionObjArgs(top_hooks, Py_True, nullptr));
  if (!hooks || !PyTuple_Check(hooks.get())) return false;
  PyObject* pack = PyTuple_GetItem(hooks.get(), 0);
  return pack && PyCFunction_Check(pack) && PyCFunction_GetSelf(pack) == discarder.get();
}

// Announces an op without a second result that is recomputed; false, perhaps with an error, in other cases.
bool announces(PyObject* announcement, PyObject* is_elementwise, PyObject* total) {
  const Owned discarder = innermost();
  if (!discarder) return false;
  if (discarder.is(Py_None)) return true;
  const DiscarderClass& slots = classes.discarder;
  if (!slots.is_paused.is(discarder.get(), Py_False) || !has_innermost_hooks(discarder)) return false;
  if (total != Py_None && !slots.is_in_layer.is(discarder.get(), Py_False)) return false;
  const Owned announced = classes.announced.object(), saved(announced ? PyDict_New() : nullptr);
  if (!saved) return false;
  classes.announced.announcement.set(announced.get(), announcement);
  classes.announced.is_elementwise.set(announced.get(), is_elementwise);
  classes.announced.total.set(announced.get(), Py_None);
  classes.announced.saved.set(announced.get(), saved.get());
  slots.announced.set(discarder.get(), announced.get());
  return true;
}

PyObject* announce(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "expected (announcement, is_elementwise, total)");
  if (announces(objects[0], objects[1], objects[2])) return PyBool_FromLong(1);
  return PyErr_Occurred() && no_if_exception() == failed ? nullptr : PyBool_FromLong(0);
}

int64_t bytes_of(const DLTensor& tensor) {
  int64_t bytes = tensor.bits / 8;
  for (int32_t dim = 0; dim < tensor.dim; ++dim) bytes *= tensor.sizes[dim];
  return bytes;
}

// The address of a tensor's storage.
Owned address_of(PyObject* tensor) { return attribute(tensor_members.untyped_storage.of(tensor), of_cdata); }

// The output of an announced op, and the tensors that the op's node has saved. Where a question is answered with false,
// perhaps with an error, the case is left to Python. Once `record` or `drop` has begun, errors are raised, because the
// announcement is gone.
class Recording {
 public:
  Recording(PyObject* discarder, PyObject* output) : discarder_(discarder), output_(output) {}

  // Whether the output is plain, and an op with a recipe has been announced.
  bool is_announced() {
    if (!is_tensor_type(Py_TYPE(output_)) || describe(output_, &described_) != yes) return false;
    if (bytes_of(described_) == 0 || !tensor_members.requires_grad.of(output_).is(Py_True)) return false;
    const Owned offset = tensor_members.storage_offset.of(output_);
    if (!offset || PyLong_AsLong(offset.get()) != 0) return false;
    if (!classes.discarder.may_be_sharded.is(discarder_, Py_False)) return false;
    announced_ = shared(classes.discarder.announced.of(discarder_));
    if (!announced_ || !classes.announced.is_type_of(announced_.get())) return false;
    announcement_ = shared(classes.announced.announcement.of(announced_.get()));
    if (!announcement_ || !is_tuple_of(announcement_.get(), 2)) return false;
    saved_ = shared(classes.announced.saved.of(announced_.get()));
    return saved_ && PyDict_CheckExact(saved_.get()) && PyDict_Size(saved_.get()) != 0 &&
           PyTuple_Check(PyTuple_GetItem(announcement_.get(), 1));
  }

  // Whether the recipe reads only contents that the node keeps unchanged.
  bool reads_kept_contents() {
    operands_ = operands();
    return bool(operands_);
  }

  // Whether the recipe would read, and so keep, a tensor that takes as much memory as the output.
  bool keeps_too_much() const {
    PyObject* tensors = PyTuple_GetItem(announcement_.get(), 1);
    for (Py_ssize_t i = 0; i < PyTuple_Size(tensors); ++i) {
      DLTensor described;
      PyObject* tensor = PyTuple_GetItem(tensors, i);
      const Answer is_plain = tensor == Py_None ? no : describe(tensor, &described);
      if (is_plain == failed) return false;
      if (is_plain == no || bytes_of(described) < bytes_of(described_)) continue;
      const Owned is_leaf = tensor_members.is_leaf.of(tensor);
      const Answer shares = is_leaf.is(Py_False) ? shares_memory(tensor) : yes;
      if (shares == no) return is_surely_kept(discarder_, tensor);
      if (shares == failed) return false;
    }
    return false;
  }

  // Ends the announcement without a recipe. A node that does not save the output either is marked for graph.cpp. False
  // after an error.
  bool drop() const {
    classes.discarder.announced.set(discarder_, Py_None);
    const Answer shares = shares_memory(output_);
    if (shares != no) return shares == yes;
    const Owned node = tensor_members.grad_fn.of(output_);
    return node && PyObject_SetAttr(node.get(), of_recomputed_block, Py_None) == 0;
  }

  // False after an error.
  bool record() const {
    classes.discarder.announced.set(discarder_, Py_None);
    const Owned dtype = tensor_members.dtype.of(output_);
    const Owned recipe = dtype ? recipe_of(dtype) : Owned();
    const Owned entry = recipe ? entry_of(recipe, dtype) : Owned();
    const Owned block = entry ? block_of(entry) : Owned();
    const Owned node = block ? tensor_members.grad_fn.of(output_) : Owned();
    if (!node || PyObject_SetAttr(node.get(), of_recomputed_block, block.get()) != 0) return false;
    // The recipe lives as long as the node that saves the recipe's operands.
    Py_ssize_t at = 0;
    PyObject *key, *packed;
    if (!PyDict_Next(saved_.get(), &at, &key, &packed)) return false;
    classes.cell.attached.set(PyTuple_GetItem(packed, 1), recipe.get());
    return add(entry);
  }

 private:
  // The contents of cells that stay unchanged as long as the node lives.
  Owned operands() const {
    PyObject* tensors = PyTuple_GetItem(announcement_.get(), 1);
    const Py_ssize_t count = PyTuple_Size(tensors);
    Owned found(PyList_New(count));
    for (Py_ssize_t i = 0; found && i < count; ++i) {
      PyObject* tensor = PyTuple_GetItem(tensors, i);
      PyObject* content = tensor == Py_None ? tensor : kept(tensor);
      if (!content || PyList_SetItem(found.get(), i, shared(content).release()) != 0) return Owned();
    }
    return found;
  }

  // Whether the tensor shares its storage with a saved tensor.
  Answer shares_memory(PyObject* tensor) const {
    const Owned storage = address_of(tensor);
    Py_ssize_t at = 0;
    PyObject *key, *packed;
    while (storage && PyDict_Next(saved_.get(), &at, &key, &packed)) {
      const Owned other = is_tuple_of(packed, 3) ? address_of(PyTuple_GetItem(packed, 0)) : Owned();
      if (!other) return failed;
      if (are_equal(storage.get(), other.get())) return yes;
    }
    return PyErr_Occurred() ? failed : no;
  }

  // The content of the node's cell for a tensor, borrowed, if that is a `Kept` which no recipe may replace.
  PyObject* kept(PyObject* tensor) const {
    const Owned identity(PyLong_FromVoidPtr(tensor));
    PyObject* packed = identity ? PyDict_GetItemWithError(saved_.get(), identity.get()) : nullptr;
    if (!packed || !is_tuple_of(packed, 3) || PyTuple_GetItem(packed, 2) != Py_False) return nullptr;
    PyObject* cell = PyTuple_GetItem(packed, 1);
    PyObject* content = classes.cell.is_type_of(cell) ? classes.cell.content.of(cell) : nullptr;
    return content && classes.kept.is_type_of(content) ? content : nullptr;
  }

  Owned recipe_of(const Owned& dtype) const {
    const Owned size = tensor_members.size.of(output_), stride = size ? tensor_members.stride.of(output_) : Owned();
    const Owned layout(stride ? PyTuple_Pack(3, size.get(), stride.get(), dtype.get()) : nullptr);
    const Owned backend(layout ? PyObject_CallNoArgs(chosen) : nullptr);
    const Owned own_lock(backend ? PyObject_CallNoArgs(lock) : nullptr);
    const Owned claims(own_lock ? PySet_New(nullptr) : nullptr);
    Owned recipe = claims ? classes.recipe.object() : Owned();
    if (!recipe) return Owned();
    classes.recipe.depth.set(recipe.get(), one);
    classes.recipe.rebuild.set(recipe.get(), PyTuple_GetItem(announcement_.get(), 0));
    classes.recipe.operands.set(recipe.get(), operands_.get());
    classes.recipe.layout.set(recipe.get(), layout.get());
    classes.recipe.backend.set(recipe.get(), backend.get());
    classes.recipe.lock.set(recipe.get(), own_lock.get());
    classes.recipe.made.set(recipe.get(), Py_None);
    classes.recipe.claims.set(recipe.get(), claims.get());
    return recipe;
  }

  Owned entry_of(const Owned& recipe, const Owned& dtype) const {
    const Owned version = tensor_members.version.of(output_);
    const Owned storage = version ? reference_to_storage(output_) : Owned();
    const Owned output(storage ? PyWeakref_NewRef(output_, nullptr) : nullptr);
    const Owned reference(output ? PyWeakref_NewRef(recipe.get(), nullptr) : nullptr);
    Owned entry = reference ? classes.entry.object() : Owned();
    if (!entry) return Owned();
    classes.entry.storage.set(entry.get(), storage.get());
    classes.entry.output.set(entry.get(), output.get());
    classes.entry.dtype.set(entry.get(), dtype.get());
    classes.entry.version.set(entry.get(), version.get());
    classes.entry.recipe.set(entry.get(), reference.get());
    return entry;
  }

  Owned block_of(const Owned& entry) const {
    const Owned watch = version_watch(output_);
    Owned block = watch ? classes.block.object() : Owned();
    if (!block) return Owned();
    classes.block.owner.set(block.get(), discarder_);
    classes.block.entry.set(block.get(), entry.get());
    classes.block.watch.set(block.get(), watch.get());
    return block;
  }

  // Entries.add
  bool add(const Owned& entry) const {
    const Owned entries = shared(classes.discarder.all_entries.of(discarder_));
    const Owned size = attribute(entries, of_sweep_size);
    const long sweep_size = size ? PyLong_AsLong(size.get()) : -1;
    if (PyErr_Occurred()) return false;
    if (PyDict_Size(entries.get()) < sweep_size)
      return PyDict_SetItem(entries.get(), address_in(shared(classes.entry.storage.of(entry.get()))), entry.get()) == 0;
    return bool(Owned(PyObject_CallMethodObjArgs(entries.get(), of_add, entry.get(), nullptr)));
  }

  PyObject *discarder_, *output_;
  DLTensor described_;
  Owned announced_, announcement_, saved_, operands_;
};

PyObject* record(PyObject*, PyObject* output) {
  const Owned discarder = innermost();
  if (discarder) {
    if (discarder.is(Py_None)) return PyBool_FromLong(1);
    Recording recording(discarder.get(), output);
    if (recording.is_announced()) {
      if (recording.reads_kept_contents()) return recording.record() ? PyBool_FromLong(1) : nullptr;
      if (!PyErr_Occurred() && recording.keeps_too_much()) return recording.drop() ? PyBool_FromLong(1) : nullptr;
    }
  }
  return PyErr_Occurred() && no_if_exception() == failed ? nullptr : PyBool_FromLong(0);
}

PyObject* set_up_records(PyObject*, PyObject* arguments) {
  PyObject* nothing;
  if (!PyArg_ParseTuple(arguments, "OOOOO", &thread, &top_hooks, &chosen, &lock, &nothing)) return nullptr;
  if (!make_watches_by(nothing)) return nullptr;
  for (PyObject* each : {thread, top_hooks, chosen, lock}) Py_INCREF(each);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"set_up_records", set_up_records, METH_VARARGS,
     "set_up_records(thread, top_hooks, chosen, lock, nothing): the contexts of each thread; functions that return the "
     "innermost hooks of this thread, the chosen backend, a new lock, and an empty tensor of a dtype."},
    {"announce", CKPT_FAST(announce),
     "announce(announcement, is_elementwise, total): as in Python; False, with nothing done, in all but the usual "
     "cases."},
    {"record", record, METH_O,
     "record(output): records the output of the announced op in the innermost context; False, with nothing done, in "
     "all but the usual case."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_records(PyObject* module) {
  one = PyLong_FromLong(1);
  return one &&
         prepare_names({{&of_active, "active"},
                        {&of_add, "add"},
                        {&of_cdata, "_cdata"},
                        {&of_recomputed_block, "recomputed_block"},
                        {&of_sweep_size, "sweep_size"}}) &&
         PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace ckpt
