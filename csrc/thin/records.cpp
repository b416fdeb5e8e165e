#include "records.h"

#include "owned.h"

namespace ckpt {

namespace {

// The Python classes of the objects created here; and Python functions that return the chosen backend, a new lock, and
// an empty tensor of a dtype.
PyTypeObject *recipe_type = nullptr, *entry_type = nullptr, *block_type = nullptr;
PyObject *storage_reference = nullptr, *chosen = nullptr, *lock = nullptr, *nothing = nullptr, *one = nullptr;

PyObject *of_add, *of_all_entries, *of_announced, *of_announcement, *of_attached, *of_backend, *of_claims, *of_data,
    *of_depth, *of_detach, *of_dtype, *of_entry, *of_grad_fn, *of_kept, *of_layout, *of_lock, *of_made, *of_operands,
    *of_output, *of_owner, *of_rebuild, *of_recipe, *of_recomputed_block, *of_requires_grad, *of_saved, *of_size,
    *of_storage, *of_storage_offset, *of_stride, *of_tensor_version, *of_untyped_storage, *of_version, *of_watch;

Owned called_with(PyObject* function, const Owned& argument) {
  return Owned(argument ? PyObject_CallFunctionObjArgs(function, argument.get(), nullptr) : nullptr);
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
    if (!attribute(output_, of_requires_grad).is(Py_True)) return false;
    const Owned offset = called(output_, of_storage_offset);
    if (!offset || PyLong_AsLong(offset.get()) != 0) return false;
    announced_ = attribute(discarder_, of_announced);
    if (!announced_ || announced_.is(Py_None)) return false;
    announcement_ = attribute(announced_, of_announcement);
    if (!announcement_ || !PyTuple_Check(announcement_.get())) return false;
    saved_ = attribute(announced_, of_saved);
    if (!saved_ || !PyDict_CheckExact(saved_.get()) || PyDict_Size(saved_.get()) == 0) return false;
    operands_ = operands();
    return bool(operands_);
  }

  // False after an error.
  bool record() const {
    if (PyObject_SetAttr(discarder_, of_announced, Py_None) != 0) return false;
    const Owned dtype = attribute(output_, of_dtype);
    const Owned recipe = dtype ? recipe_of(dtype) : Owned();
    const Owned entry = recipe ? entry_of(recipe, dtype) : Owned();
    const Owned block = entry ? block_of(entry) : Owned();
    const Owned node = block ? attribute(output_, of_grad_fn) : Owned();
    if (!node || PyObject_SetAttr(node.get(), of_recomputed_block, block.get()) != 0) return false;
    // The recipe lives as long as the node that saves the recipe's operands.
    Py_ssize_t at = 0;
    PyObject *key, *packed;
    if (!PyDict_Next(saved_.get(), &at, &key, &packed)) return false;
    const Owned cell = shared(PyTuple_GetItem(packed, 1));
    if (!cell || PyObject_SetAttr(cell.get(), of_attached, recipe.get()) != 0) return false;
    const Owned entries = attribute(discarder_, of_all_entries);
    return entries && Owned(PyObject_CallMethodObjArgs(entries.get(), of_add, entry.get(), nullptr));
  }

 private:
  Owned operands() const {
    PyObject* tensors = PyTuple_GetItem(announcement_.get(), 1);
    const Owned kept = attribute(announced_, of_kept);
    if (!tensors || !PyTuple_Check(tensors) || !kept || !PyDict_CheckExact(kept.get())) return Owned();
    const Py_ssize_t count = PyTuple_Size(tensors);
    Owned found(PyList_New(count));
    for (Py_ssize_t i = 0; found && i < count; ++i) {
      const Owned identity(PyLong_FromVoidPtr(PyTuple_GetItem(tensors, i)));
      PyObject* content = identity ? PyDict_GetItemWithError(kept.get(), identity.get()) : nullptr;
      if (!content || PyList_SetItem(found.get(), i, shared(content).release()) != 0) return Owned();
    }
    return found;
  }

  Owned recipe_of(const Owned& dtype) const {
    const Owned size = called(output_, of_size), stride = size ? called(output_, of_stride) : Owned();
    const Owned layout(stride ? PyTuple_Pack(3, size.get(), stride.get(), dtype.get()) : nullptr);
    if (!layout) return Owned();
    PyObject* rebuild = PyTuple_GetItem(announcement_.get(), 0);
    const Owned backend(rebuild ? PyObject_CallNoArgs(chosen) : nullptr);
    const Owned own_lock(backend ? PyObject_CallNoArgs(lock) : nullptr);
    const Owned claims(own_lock ? PySet_New(nullptr) : nullptr);
    if (!claims) return Owned();
    return made(recipe_type, {{of_depth, one},
                              {of_rebuild, rebuild},
                              {of_operands, operands_.get()},
                              {of_layout, layout.get()},
                              {of_backend, backend.get()},
                              {of_lock, own_lock.get()},
                              {of_made, Py_None},
                              {of_claims, claims.get()}});
  }

  Owned entry_of(const Owned& recipe, const Owned& dtype) const {
    const Owned version = attribute(output_, of_tensor_version);
    const Owned storage = version ? called_with(storage_reference, called(output_, of_untyped_storage)) : Owned();
    const Owned output(storage ? PyWeakref_NewRef(output_, nullptr) : nullptr);
    const Owned reference(output ? PyWeakref_NewRef(recipe.get(), nullptr) : nullptr);
    if (!reference) return Owned();
    return made(entry_type, {{of_storage, storage.get()},
                             {of_output, output.get()},
                             {of_dtype, dtype.get()},
                             {of_version, version.get()},
                             {of_recipe, reference.get()}});
  }

  // The block's record, with an empty tensor that shares the output's version counter.
  Owned block_of(const Owned& entry) const {
    const Owned watch = called(output_, of_detach), dtype = watch ? attribute(watch, of_dtype) : Owned();
    const Owned empty = called_with(nothing, dtype);
    if (!empty || PyObject_SetAttr(watch.get(), of_data, empty.get()) != 0) return Owned();
    return made(block_type, {{of_owner, discarder_}, {of_entry, entry.get()}, {of_watch, watch.get()}});
  }

  PyObject *discarder_, *output_;
  Owned announced_, announcement_, saved_, operands_;
};

PyObject* record(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "expected (discarder, output)");
  Recording recording(objects[0], objects[1]);
  if (recording.is_usual()) return recording.record() ? PyBool_FromLong(1) : nullptr;
  return PyErr_Occurred() && no_if_exception() == failed ? nullptr : PyBool_FromLong(0);
}

PyObject* set_up_records(PyObject*, PyObject* arguments) {
  PyObject *recipe, *entry, *block;
  if (!PyArg_ParseTuple(arguments, "O!O!O!OOOO", &PyType_Type, &recipe, &PyType_Type, &entry, &PyType_Type, &block,
                        &storage_reference, &chosen, &lock, &nothing))
    return nullptr;
  for (PyObject* each : {recipe, entry, block, storage_reference, chosen, lock, nothing}) Py_INCREF(each);
  recipe_type = reinterpret_cast<PyTypeObject*>(recipe);
  entry_type = reinterpret_cast<PyTypeObject*>(entry);
  block_type = reinterpret_cast<PyTypeObject*>(block);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"set_up_records", set_up_records, METH_VARARGS,
     "set_up_records(recipe, entry, block, storage_reference, chosen, lock, nothing): the classes of the objects "
     "created here, and functions that return the chosen backend, a new lock, and an empty tensor of a dtype."},
    {"record", CKPT_FAST(record),
     "record(discarder, output): Discarder.record; False, with nothing done, in all but the usual case."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_records(PyObject* module) {
  one = PyLong_FromLong(1);
  return one &&
         prepare_names({{&of_add, "add"},
                        {&of_all_entries, "all_entries"},
                        {&of_announced, "announced"},
                        {&of_announcement, "announcement"},
                        {&of_attached, "attached"},
                        {&of_backend, "backend"},
                        {&of_claims, "claims"},
                        {&of_data, "data"},
                        {&of_depth, "depth"},
                        {&of_detach, "detach"},
                        {&of_dtype, "dtype"},
                        {&of_entry, "entry"},
                        {&of_grad_fn, "grad_fn"},
                        {&of_kept, "kept"},
                        {&of_layout, "layout"},
                        {&of_lock, "lock"},
                        {&of_made, "made"},
                        {&of_operands, "operands"},
                        {&of_output, "output"},
                        {&of_owner, "owner"},
                        {&of_rebuild, "rebuild"},
                        {&of_recipe, "recipe"},
                        {&of_recomputed_block, "recomputed_block"},
                        {&of_requires_grad, "requires_grad"},
                        {&of_saved, "saved"},
                        {&of_size, "size"},
                        {&of_storage, "storage"},
                        {&of_storage_offset, "storage_offset"},
                        {&of_stride, "stride"},
                        {&of_tensor_version, "_version"},
                        {&of_untyped_storage, "untyped_storage"},
                        {&of_version, "version"},
                        {&of_watch, "watch"}}) &&
         PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace ckpt
