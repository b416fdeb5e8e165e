#include "records.h"

#include "classes.h"
#include "members.h"
#include "questions.h"
#include "storages.h"

namespace ckpt {

namespace {

// The contexts of each thread, and the function that returns the innermost hooks of this thread.
PyObject *thread = nullptr, *top_hooks = nullptr;
// Functions that return the chosen backend, a new lock, and an empty tensor of a dtype.
PyObject *chosen = nullptr, *lock = nullptr, *nothing = nullptr;
PyObject* one = nullptr;

PyObject *of_active, *of_add, *of_data, *of_recomputed_block;

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

// The output of an announced op, and the tensors that the op's node has saved. If `is_usual` returns false, perhaps
// with an error, the case is left to Python. Once `record` has begun, errors are raised, because the announcement is
// gone.
class Recording {
 public:
  Recording(PyObject* discarder, PyObject* output) : discarder_(discarder), output_(output) {}

  // Whether the output is plain, and the recipe reads only contents that the node keeps unchanged.
  bool is_usual() {
    DLTensor described;
    if (!is_tensor_type(Py_TYPE(output_)) || describe(output_, &described) != yes) return false;
    for (int32_t dim = 0; dim < described.dim; ++dim) {
      if (described.sizes[dim] == 0) return false;
    }
    if (!tensor_members.requires_grad.of(output_).is(Py_True)) return false;
    const Owned offset = tensor_members.storage_offset.of(output_);
    if (!offset || PyLong_AsLong(offset.get()) != 0) return false;
    announced_ = shared(classes.discarder.announced.of(discarder_));
    if (!announced_ || !classes.announced.is_type_of(announced_.get())) return false;
    announcement_ = shared(classes.announced.announcement.of(announced_.get()));
    if (!announcement_ || !PyTuple_Check(announcement_.get())) return false;
    saved_ = shared(classes.announced.saved.of(announced_.get()));
    if (!saved_ || !PyDict_CheckExact(saved_.get()) || PyDict_Size(saved_.get()) == 0) return false;
    operands_ = operands();
    return bool(operands_);
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
    if (!tensors || !PyTuple_Check(tensors)) return Owned();
    if (!classes.discarder.may_be_sharded.is(discarder_, Py_False)) return Owned();
    const Py_ssize_t count = PyTuple_Size(tensors);
    Owned found(PyList_New(count));
    for (Py_ssize_t i = 0; found && i < count; ++i) {
      PyObject* tensor = PyTuple_GetItem(tensors, i);
      PyObject* content = tensor == Py_None ? tensor : kept(tensor);
      if (!content || PyList_SetItem(found.get(), i, shared(content).release()) != 0) return Owned();
    }
    return found;
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

  // The block's record, with an empty tensor that shares the output's version counter.
  Owned block_of(const Owned& entry) const {
    const Owned watch = tensor_members.detach.of(output_), dtype = watch ? tensor_members.dtype.of(watch) : Owned();
    const Owned empty(dtype ? PyObject_CallFunctionObjArgs(nothing, dtype.get(), nullptr) : nullptr);
    if (!empty || PyObject_SetAttr(watch.get(), of_data, empty.get()) != 0) return Owned();
    Owned block = classes.block.object();
    if (!block) return Owned();
    classes.block.owner.set(block.get(), discarder_);
    classes.block.entry.set(block.get(), entry.get());
    classes.block.watch.set(block.get(), watch.get());
    return block;
  }

  // Entries.add
  bool add(const Owned& entry) const {
    const Owned entries = shared(classes.discarder.all_entries.of(discarder_));
    PyObject* by_storage = classes.entries.by_storage.of(entries.get());
    const long sweep_size = PyLong_AsLong(classes.entries.sweep_size.of(entries.get()));
    if (PyErr_Occurred()) return false;
    if (PyDict_Size(by_storage) < sweep_size)
      return PyDict_SetItem(by_storage, address_in(shared(classes.entry.storage.of(entry.get()))), entry.get()) == 0;
    return bool(Owned(PyObject_CallMethodObjArgs(entries.get(), of_add, entry.get(), nullptr)));
  }

  PyObject *discarder_, *output_;
  Owned announced_, announcement_, saved_, operands_;
};

PyObject* record(PyObject*, PyObject* output) {
  const Owned discarder = innermost();
  if (discarder) {
    if (discarder.is(Py_None)) return PyBool_FromLong(1);
    Recording recording(discarder.get(), output);
    if (recording.is_usual()) return recording.record() ? PyBool_FromLong(1) : nullptr;
  }
  return PyErr_Occurred() && no_if_exception() == failed ? nullptr : PyBool_FromLong(0);
}

PyObject* set_up_records(PyObject*, PyObject* arguments) {
  if (!PyArg_ParseTuple(arguments, "OOOOO", &thread, &top_hooks, &chosen, &lock, &nothing)) return nullptr;
  for (PyObject* each : {thread, top_hooks, chosen, lock, nothing}) Py_INCREF(each);
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
                        {&of_data, "data"},
                        {&of_recomputed_block, "recomputed_block"}}) &&
         PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace ckpt
