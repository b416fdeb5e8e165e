#include "guards.h"

#include "owned.h"
#include "questions.h"
#include "sites.h"

namespace ckpt {

namespace {

// The answer as a Python bool. Python will raise an exception of this path again.
PyObject* truth_of(Answer answer) {
  if (answer == failed) answer = no_if_exception();
  return answer == failed ? nullptr : PyBool_FromLong(answer == yes);
}

PyObject* are_same(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (count != 2 || !PyTuple_Check(objects[0])) return PyErr_Format(PyExc_TypeError, "expected (found, missing)");
  const Answer answer = are_all_the_same(objects[0], objects[1]);
  return answer == failed ? nullptr : PyBool_FromLong(answer == yes);
}

// Whether two values of dicts are the same object, or the second is `any`.
bool is_value(PyObject* value, PyObject* other, PyObject* any) { return value == other || other == any; }

// The same as `has_items_of`, for dicts that may have an order of their own, such as OrderedDict.
bool has_ordered_items_of(PyObject* dict, PyObject* other, PyObject* any) {
  const Owned names(PySequence_List(dict)), others(PySequence_List(other));
  for (Py_ssize_t i = 0; i < PyDict_Size(dict); ++i) {
    PyObject* name = names && others ? PyList_GetItem(names.get(), i) : nullptr;
    if (!name || name != PyList_GetItem(others.get(), i)) return false;
    if (!is_value(PyDict_GetItemWithError(dict, name), PyDict_GetItemWithError(other, name), any)) return false;
  }
  return true;
}

// Whether a dict has the names of the other, in the same order, and the same values where the other's are not `any`.
// False, perhaps with an error, if not.
bool has_items_of(PyObject* dict, PyObject* other, PyObject* any) {
  if (!PyDict_Check(dict) || !PyDict_Check(other) || PyDict_Size(dict) != PyDict_Size(other)) return false;
  if (PyDict_Size(dict) == 0) return true;
  if (!PyDict_CheckExact(dict)) return has_ordered_items_of(dict, other, any);
  Py_ssize_t place = 0, other_place = 0;
  PyObject *name, *value, *other_name, *other_value;
  while (PyDict_Next(dict, &place, &name, &value)) {
    if (!PyDict_Next(other, &other_place, &other_name, &other_value) || name != other_name) return false;
    if (!is_value(value, other_value, any)) return false;
  }
  return true;
}

PyObject* are_same_dicts(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (count != 2 || !PyList_Check(objects[0])) return PyErr_Format(PyExc_TypeError, "expected (dicts, any)");
  for (Py_ssize_t i = 0; i + 1 < PyList_Size(objects[0]); i += 2) {
    if (!has_items_of(PyList_GetItem(objects[0], i), PyList_GetItem(objects[0], i + 1), objects[1]))
      return PyErr_Occurred() ? nullptr : PyBool_FromLong(0);
  }
  Py_RETURN_TRUE;
}

PyObject* is_such(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "expected (module, such)");
  Such such;
  if (!such.read(objects[1])) return nullptr;
  Answer answer = is_such_class(Py_TYPE(objects[0]), such);
  if (answer == yes) {
    PyObject* held = held_by_itself(objects[0]);
    answer = held ? is_such_itself(held, such) : failed;
    Py_XDECREF(held);
  }
  return truth_of(answer);
}

PyObject* plain_linears(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (count < 2) return PyErr_Format(PyExc_TypeError, "expected (such, input, *modules)");
  Such such;
  if (!such.read(objects[0])) return nullptr;
  DLTensor input;
  const Answer described = describe(objects[1], &input);
  if (described == failed) return nullptr;
  if (described == no) Py_RETURN_NONE;
  PyObject* found = PyList_New(0);
  if (!found) return nullptr;
  Answer answer = yes;
  PyTypeObject* kind = nullptr;
  for (Py_ssize_t i = 2; answer == yes && i < count; ++i) {
    if (Py_TYPE(objects[i]) != kind) {  // each class is checked once
      kind = Py_TYPE(objects[i]);
      answer = is_such_class(kind, such);
      if (answer != yes) break;
    }
    PyObject* held = held_by_itself(objects[i]);
    answer = held ? is_such_itself(held, such) : failed;
    if (answer == yes) {
      PyObject* pair = linear_of(held, input);
      answer = pair ? PyList_Append(found, pair) == 0 ? yes : failed : PyErr_Occurred() ? failed : no;
      Py_XDECREF(pair);
    }
    Py_XDECREF(held);
  }
  if (answer == yes) return found;
  Py_DECREF(found);
  if (answer == failed && no_if_exception() == failed) return nullptr;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"are_same", CKPT_FAST(are_same),
     "are_same(found, missing): whether each holder still has its value, for tuples (holder, name, value)."},
    {"are_same_dicts", CKPT_FAST(are_same_dicts),
     "are_same_dicts(dicts, any): whether each first, third, ... dict has the names and values of the next one; `any` "
     "there equals all values."},
    {"is_such", CKPT_FAST(is_such), "is_such(module, such): whether a module is as `such` describes."},
    {"plain_linears", CKPT_FAST(plain_linears),
     "plain_linears(such, input, *modules): weights and biases of linear layers that are as `such` describes and fit "
     "the input; None if one may not be."},
    {"operands", CKPT_FAST(operands),
     "operands(quiet, owner, linear, activations, wanted, *values): the operands of a call site; None if anything may "
     "have changed."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_guards(PyObject* module) {
  return prepare_questions() && prepare_sites() && PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace ckpt
