#include "unpacking.h"

#include "classes.h"
#include "members.h"
#include "questions.h"

namespace ckpt {

namespace {

// The arguments of `set_up_unpacking`.
PyObject *unpack_in_python = nullptr, *seekers = nullptr, *graph_task = nullptr, *chosen = nullptr;
PyObject *is_grad_enabled = nullptr, *is_inference = nullptr;

PyObject *of_as_strided, *of_laid_out, *of_serve;

// All functions below that return null do so, perhaps with an error, where Python must unpack.

// The tensor of a `Kept`, without an in-place write since, and with memory.
Owned kept_tensor(PyObject* kept) {
  const KeptClass& slots = classes.kept;
  if (!slots.is_plain.is(kept, Py_True)) return Owned();
  Owned tensor = shared(slots.tensor.of(kept));
  const Owned version = tensor_members.version.of(tensor);
  if (!version || !are_equal(version.get(), slots.version.of(kept))) return Owned();
  DLTensor described;
  return describe(tensor.get(), &described) == yes && described.data ? std::move(tensor) : Owned();
}

// The tensors of operands that are None or `Kept`, as a tuple.
Owned kept_tensors(PyObject* operands) {
  if (!operands || !PyList_CheckExact(operands)) return Owned();
  const Py_ssize_t count = PyList_Size(operands);
  Owned tensors(PyTuple_New(count));
  for (Py_ssize_t i = 0; tensors && i < count; ++i) {
    PyObject* operand = PyList_GetItem(operands, i);
    if (operand != Py_None && !classes.kept.is_type_of(operand)) return Owned();
    Owned tensor = operand == Py_None ? shared(Py_None) : kept_tensor(operand);
    if (!tensor || PyTuple_SetItem(tensors.get(), i, tensor.release()) != 0) return Owned();
  }
  return tensors;
}

struct Geometry {
  Owned size, stride, offset;

  explicit Geometry(const Owned& tensor)
      : size(tensor_members.size.of(tensor.get())),
        stride(size ? tensor_members.stride.of(tensor.get()) : Owned()),
        offset(stride ? tensor_members.storage_offset.of(tensor.get()) : Owned()) {}
  explicit operator bool() const { return bool(offset); }
  bool is(PyObject* other_size, PyObject* other_stride) const {
    return are_equal(size.get(), other_size) && are_equal(stride.get(), other_stride);
  }
};

// Whether the recipe's function may run as it is: with the backend of the forward pass, and without a new graph.
bool runs_as_it_is(PyObject* recipe) {
  const Owned backend(PyObject_CallNoArgs(chosen));
  if (!backend || !are_equal(backend.get(), classes.recipe.backend.of(recipe))) return false;
  return Owned(PyObject_CallNoArgs(is_grad_enabled)).is(Py_False) &&
         Owned(PyObject_CallNoArgs(is_inference)).is(Py_False);
}

// The value as a tensor of the recipe's layout: Recipe._laid_out.
Owned laid_out(PyObject* recipe, Owned value) {
  PyObject* layout = classes.recipe.layout.of(recipe);
  if (layout == Py_None) return value;
  if (!is_tuple_of(layout, 3)) return Owned();
  const Geometry geometry(value);
  const Owned dtype = geometry ? tensor_members.dtype.of(value) : Owned();
  if (!dtype) return Owned();
  if (dtype.is(PyTuple_GetItem(layout, 2)) && geometry.is(PyTuple_GetItem(layout, 0), PyTuple_GetItem(layout, 1)) &&
      PyLong_AsLong(geometry.offset.get()) == 0)
    return value;
  return Owned(PyObject_CallMethodObjArgs(recipe, of_laid_out, value.get(), nullptr));
}

// The claim's view of the whole tensor.
Owned view(PyObject* claim, Owned whole) {
  PyObject* wanted = classes.claim.geometry.of(claim);
  if (wanted == Py_None) return whole;
  if (!is_tuple_of(wanted, 3)) return Owned(PyErr_Format(PyExc_TypeError, "expected a tuple of 3 fields"));
  const Geometry geometry(whole);
  if (!geometry) return Owned();
  PyObject *size = PyTuple_GetItem(wanted, 0), *stride = PyTuple_GetItem(wanted, 1),
           *offset = PyTuple_GetItem(wanted, 2);
  if (geometry.is(size, stride) && are_equal(geometry.offset.get(), offset)) return whole;
  return Owned(PyObject_CallMethodObjArgs(whole.get(), of_as_strided, size, stride, offset, nullptr));
}

// The whole tensor of a recipe's only claim. No other claim can ask for it, so nothing is shared, and no lock is
// needed.
Owned made_again(PyObject* claim) {
  const Owned recipe = shared(classes.claim.recipe.of(claim));
  if (!classes.recipe.is_type_of(recipe.get()) || !classes.recipe.made.is(recipe.get(), Py_None)) return Owned();
  if (PySet_Size(classes.recipe.claims.of(recipe.get())) != 1 || !runs_as_it_is(recipe.get())) return Owned();
  const Owned tensors = kept_tensors(classes.recipe.operands.of(recipe.get()));
  Owned value(tensors ? PyObject_CallObject(classes.recipe.rebuild.of(recipe.get()), tensors.get()) : nullptr);
  Owned whole = value ? laid_out(recipe.get(), std::move(value)) : Owned();
  Owned task(whole ? PyObject_CallNoArgs(graph_task) : nullptr);
  if (!task) return Owned();
  classes.claim.served.take(claim, task.release());
  classes.claim.made.set(claim, Py_None);
  return whole;
}

Owned unpacked(PyObject* content) {
  if (classes.kept.is_type_of(content)) return kept_tensor(content);
  Owned whole = classes.claim.is_type_of(content) ? made_again(content) : Owned();
  return whole ? view(content, std::move(whole)) : Owned();
}

// The tensor of a claim, which Python computes, and shares between several claims. Null after an error.
Owned served(PyObject* claim) {
  Owned whole(PyObject_CallMethodObjArgs(classes.claim.recipe.of(claim), of_serve, claim, nullptr));
  return whole ? view(claim, std::move(whole)) : Owned();
}

PyObject* unpack(PyObject*, PyObject* cell) {
  if (classes.cell.is_type_of(cell) && PyList_Size(seekers) == 0) {
    const Owned content = shared(classes.cell.content.of(cell));
    Owned tensor = unpacked(content.get());
    if (tensor) return tensor.release();
    // Python will raise an exception of this path again.
    if (PyErr_Occurred() && no_if_exception() == failed) return nullptr;
    if (classes.claim.is_type_of(content.get())) return served(content.get()).release();
  }
  return PyObject_CallFunctionObjArgs(unpack_in_python, cell, nullptr);
}

PyObject* set_up_unpacking(PyObject*, PyObject* arguments) {
  if (!PyArg_ParseTuple(arguments, "OO!OOOO", &unpack_in_python, &PyList_Type, &seekers, &graph_task, &chosen,
                        &is_grad_enabled, &is_inference))
    return nullptr;
  for (PyObject* each : {unpack_in_python, seekers, graph_task, chosen, is_grad_enabled, is_inference}) Py_INCREF(each);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"set_up_unpacking", set_up_unpacking, METH_VARARGS,
     "set_up_unpacking(unpack, seekers, graph_task, chosen, is_grad_enabled, is_inference): the function for all but "
     "the usual cases; the threads that seek identities of tensors; functions that return the number of the running "
     "backward pass, the chosen backend, and the modes of the thread."},
    {"unpack", unpack, METH_O, "unpack(cell): the saved tensor."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_unpacking(PyObject* module) {
  return prepare_names({{&of_as_strided, "as_strided"}, {&of_laid_out, "_laid_out"}, {&of_serve, "serve"}}) &&
         PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace ckpt
