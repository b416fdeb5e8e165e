#include "questions.h"

namespace ckpt {

namespace {

// Python's OrderedDict, in which modules hold hooks.
PyTypeObject* ordered_dict = nullptr;
PyObject *of_dict = nullptr, *of_order = nullptr, *of_parameters = nullptr, *of_weight = nullptr, *of_bias = nullptr;

// A new reference to the holder's attribute, or to the value in a dict under the name; null without an error if there
// is none.
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

// Whether no class except the last, Python's object, defines one of the names.
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

}  // namespace

bool is_plain_dict(PyObject* object) { return PyDict_CheckExact(object) || Py_TYPE(object) == ordered_dict; }

Answer has(PyObject* holder, PyObject* name, PyObject* value, PyObject* missing) {
  PyObject* now = held_by(holder, name);
  if (!now && PyErr_Occurred()) return failed;
  const bool is_same = (now ? now : missing) == value;
  Py_XDECREF(now);
  return is_same ? yes : no;
}

bool is_tuple_of(PyObject* object, Py_ssize_t size) { return PyTuple_Check(object) && PyTuple_Size(object) == size; }

bool read_fields(PyObject* object, std::initializer_list<PyObject**> fields, Py_ssize_t tuples_from) {
  bool fits = is_tuple_of(object, Py_ssize_t(fields.size()));
  Py_ssize_t place = 0;
  for (PyObject** field : fields) {
    if (!fits) break;
    *field = PyTuple_GetItem(object, place);
    fits = place++ < tuples_from || PyTuple_Check(*field);
  }
  if (!fits) PyErr_Format(PyExc_TypeError, "expected a tuple of %zd fields", Py_ssize_t(fields.size()));
  return fits;
}

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

Answer has_none(PyObject* held, PyObject* names) {
  const Py_ssize_t count = PyTuple_Size(names);
  for (Py_ssize_t i = 0; i < count; ++i) {
    const int found = PySequence_Contains(held, PyTuple_GetItem(names, i));
    if (found != 0) return found < 0 ? failed : no;
  }
  return yes;
}

Answer are_empty(PyObject* held, PyObject* names) {
  const Py_ssize_t count = PyTuple_Size(names);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* value = PyDict_GetItemWithError(held, PyTuple_GetItem(names, i));
    if (!value) return PyErr_Occurred() ? failed : no;
    if (!is_plain_dict(value) || PyDict_Size(value) != 0) return no;
  }
  return yes;
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

Answer is_such_itself(PyObject* held, const Such& such) {
  if (!PyDict_CheckExact(held)) return no;
  const Answer answer = are_empty(held, such.empty);
  return answer == yes ? has_none(held, such.absent) : answer;
}

PyObject* held_by_itself(PyObject* object) { return PyObject_GetAttr(object, of_dict); }

bool are_beside(const DLTensor& a, const DLTensor& b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes && a.device_type == b.device_type &&
         a.device_id == b.device_id;
}

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

bool prepare_questions() {
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
  return of_dict && of_order && of_parameters && of_weight && of_bias;
}

}  // namespace ckpt
