#include "guards.h"

namespace ckpt {

namespace {

// Python's OrderedDict, which modules hold hooks in.
PyTypeObject* ordered_dict = nullptr;
PyObject *of_dict = nullptr, *of_order = nullptr, *of_parameters = nullptr, *of_weight = nullptr, *of_bias = nullptr;

// Whether no load from it runs anybody's code.
bool is_plain_dict(PyObject* object) { return PyDict_CheckExact(object) || Py_TYPE(object) == ordered_dict; }

// A new reference to the holder's attribute, or to what a dict has under the name; null without an error where there is
// none.
PyObject* held_by(PyObject* holder, PyObject* name) {
  if (PyDict_CheckExact(holder)) {
    PyObject* value = PyDict_GetItemWithError(holder, name);
    Py_XINCREF(value);
    return value;
  }
  PyObject* value = PyObject_GetAttr(holder, name);
  if (!value && PyErr_ExceptionMatches(PyExc_AttributeError)) PyErr_Clear();
  return value;
}

// Whether the holder has this very value under the name.
Answer has(PyObject* holder, PyObject* name, PyObject* value, PyObject* missing) {
  PyObject* now = held_by(holder, name);
  if (!now && PyErr_Occurred()) return failed;
  const bool is_same = (now ? now : missing) == value;
  Py_XDECREF(now);
  return is_same ? yes : no;
}

bool is_tuple_of(PyObject* object, Py_ssize_t size) { return PyTuple_Check(object) && PyTuple_Size(object) == size; }

// Of (holder, name, value) each.
Answer are_all_the_same(PyObject* found, PyObject* missing) {
  const Py_ssize_t count = PyTuple_Size(found);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* each = PyTuple_GetItem(found, i);
    if (!each || !is_tuple_of(each, 3)) {
      PyErr_Format(PyExc_TypeError, "expected tuples (holder, name, value)");
      return failed;
    }
    const Answer answer = has(PyTuple_GetItem(each, 0), PyTuple_GetItem(each, 1), PyTuple_GetItem(each, 2), missing);
    if (answer != yes) return answer;
  }
  return yes;
}

// Whether none of the names is in the dict, or mapping.
Answer has_none(PyObject* held, PyObject* names) {
  const Py_ssize_t count = PyTuple_Size(names);
  for (Py_ssize_t i = 0; i < count; ++i) {
    const int found = PySequence_Contains(held, PyTuple_GetItem(names, i));
    if (found != 0) return found < 0 ? failed : no;
  }
  return yes;
}

// The fields of Python's `Such`.
struct Such {
  PyTypeObject* kind;
  PyObject *of_class, *same, *inherited, *empty, *absent;

  // False, and an error, where it is none.
  bool read(PyObject* such) {
    PyObject* kind_object;
    if (!PyTuple_Check(such) ||
        !PyArg_ParseTuple(such, "OO!O!O!O!O!", &kind_object, &PyTuple_Type, &of_class, &PyTuple_Type, &same,
                          &PyTuple_Type, &inherited, &PyTuple_Type, &empty, &PyTuple_Type, &absent))
      return false;
    if (!PyType_Check(kind_object)) return PyErr_Format(PyExc_TypeError, "expected a class first") != nullptr;
    kind = reinterpret_cast<PyTypeObject*>(kind_object);
    return true;
  }
};

// Whether no class but the last, Python's object, has something under the names itself.
Answer are_inherited(PyObject* kind, PyObject* names) {
  if (PyTuple_Size(names) == 0) return yes;
  PyObject* order = PyObject_GetAttr(kind, of_order);
  if (!order || !PyTuple_Check(order)) {
    Py_XDECREF(order);
    return failed;
  }
  Answer answer = yes;
  for (Py_ssize_t i = 0; answer == yes && i + 1 < PyTuple_Size(order); ++i) {
    PyObject* held = PyObject_GetAttr(PyTuple_GetItem(order, i), of_dict);
    answer = held ? has_none(held, names) : failed;
    Py_XDECREF(held);
  }
  Py_DECREF(order);
  return answer;
}

Answer is_such_class(PyTypeObject* type, const Such& such) {
  if (!PyType_IsSubtype(type, such.kind)) return no;
  PyObject* kind = reinterpret_cast<PyObject*>(type);
  const Py_ssize_t count = PyTuple_Size(such.of_class);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* each = PyTuple_GetItem(such.of_class, i);
    if (!is_tuple_of(each, 2)) return no;
    const Answer answer = has(kind, PyTuple_GetItem(each, 0), PyTuple_GetItem(each, 1), nullptr);
    if (answer != yes) return answer;
  }
  const Answer answer = are_all_the_same(such.same, nullptr);
  return answer == yes ? are_inherited(kind, such.inherited) : answer;
}

// Of what a module holds itself.
Answer is_such_itself(PyObject* held, const Such& such) {
  if (!PyDict_CheckExact(held)) return no;
  const Py_ssize_t count = PyTuple_Size(such.empty);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* value = PyDict_GetItemWithError(held, PyTuple_GetItem(such.empty, i));
    if (!value) return PyErr_Occurred() ? failed : no;
    if (!is_plain_dict(value) || PyDict_Size(value) != 0) return no;
  }
  return has_none(held, such.absent);
}

// As they are at each call; an exception on the way is met again by whoever asks in Python.
PyObject* truth_of(Answer answer) {
  if (answer == failed) answer = no_if_exception();
  return answer == failed ? nullptr : PyBool_FromLong(answer == yes);
}

PyObject* are_same(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (count != 2 || !PyTuple_Check(objects[0])) return PyErr_Format(PyExc_TypeError, "expected (found, missing)");
  const Answer answer = are_all_the_same(objects[0], objects[1]);
  return answer == failed ? nullptr : PyBool_FromLong(answer == yes);
}

PyObject* is_such(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "expected (module, such)");
  Such such;
  if (!such.read(objects[1])) return nullptr;
  Answer answer = is_such_class(Py_TYPE(objects[0]), such);
  if (answer == yes) {
    PyObject* held = PyObject_GetAttr(objects[0], of_dict);
    answer = held ? is_such_itself(held, such) : failed;
    Py_XDECREF(held);
  }
  return truth_of(answer);
}

bool are_beside(const DLTensor& a, const DLTensor& b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes && a.device_type == b.device_type &&
         a.device_id == b.device_id;
}

// Weight and bias, as a new tuple, of a linear layer that holds these; null, without an error, where it is none that
// reads such an input.
PyObject* linear_of(PyObject* held, const DLTensor& input) {
  PyObject* parameters = PyDict_GetItemWithError(held, of_parameters);
  if (!parameters || !is_plain_dict(parameters)) return nullptr;
  PyObject* weight = PyDict_GetItemWithError(parameters, of_weight);
  PyObject* bias = weight ? PyDict_GetItemWithError(parameters, of_bias) : nullptr;
  if (!bias) return nullptr;
  DLTensor w, b;
  if (describe(weight, &w) != yes || w.dim != 2 || !are_beside(w, input)) return nullptr;
  const int64_t outputs = w.sizes[0];
  if (bias != Py_None && (describe(bias, &b) != yes || b.dim != 1 || b.sizes[0] != outputs || !are_beside(b, input)))
    return nullptr;
  return PyTuple_Pack(2, weight, bias);
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
    if (Py_TYPE(objects[i]) != kind) {  // a class is asked once
      kind = Py_TYPE(objects[i]);
      answer = is_such_class(kind, such);
      if (answer != yes) break;
    }
    PyObject* held = PyObject_GetAttr(objects[i], of_dict);
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
     "are_same(found, missing): whether each holder has what it had, of tuples (holder, name, value)."},
    {"is_such", CKPT_FAST(is_such), "is_such(module, such): whether a module is as `such` says."},
    {"plain_linears", CKPT_FAST(plain_linears),
     "plain_linears(such, input, *modules): weights and biases of linear layers that are as `such` says, beside an "
     "input of their kind; None where one may not be."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_guards(PyObject* module) {
  PyObject* collections = PyImport_ImportModule("collections");
  PyObject* ordered = collections ? PyObject_GetAttrString(collections, "OrderedDict") : nullptr;
  Py_XDECREF(collections);
  if (!ordered || !PyType_Check(ordered)) return false;
  ordered_dict = reinterpret_cast<PyTypeObject*>(ordered);
  of_dict = PyUnicode_InternFromString("__dict__");
  of_order = PyUnicode_InternFromString("__mro__");
  of_parameters = PyUnicode_InternFromString("_parameters");
  of_weight = PyUnicode_InternFromString("weight");
  of_bias = PyUnicode_InternFromString("bias");
  const bool are_made = of_dict && of_order && of_parameters && of_weight && of_bias;
  return are_made && PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace ckpt
