// The checks of code, classes, modules and tensors that the guards of converted models consist of.
#pragma once

#include <initializer_list>

#include "tensors.h"

namespace ckpt {

// Interns names and finds classes; false after an error.
bool prepare_questions();

// Whether the object is a dict whose lookups run no user code.
bool is_plain_dict(PyObject* object);

// Whether the holder has this object under the name. `missing`, which may be null, stands for an absent value.
Answer has(PyObject* holder, PyObject* name, PyObject* value, PyObject* missing);

// The same check for each (holder, name, value).
Answer are_all_the_same(PyObject* found, PyObject* missing);

// Whether none of the names is in the dict or mapping.
Answer has_none(PyObject* held, PyObject* names);

// Whether an empty dict is under each of the names.
Answer are_empty(PyObject* held, PyObject* names);

bool is_tuple_of(PyObject* object, Py_ssize_t size);

// Reads the fields of a tuple. Fields from `tuples_from` on must be tuples; else false, with an error.
bool read_fields(PyObject* object, std::initializer_list<PyObject**> fields, Py_ssize_t tuples_from);

// The fields of Python's `ModuleGuard`.
struct Such {
  PyTypeObject* kind;
  PyObject *of_class, *same, *inherited, *empty, *absent;

  // False, with an error, if the object has another form.
  bool read(PyObject* such) {
    PyObject* kind_object;
    if (!read_fields(such, {&kind_object, &of_class, &same, &inherited, &empty, &absent}, 1)) return false;
    if (!PyType_Check(kind_object)) return PyErr_Format(PyExc_TypeError, "expected a class first") != nullptr;
    kind = reinterpret_cast<PyTypeObject*>(kind_object);
    return true;
  }
};

// The parts of the check for a class, and for the attributes that a module itself has.
Answer is_such_class(PyTypeObject* type, const Such& such);
Answer is_such_itself(PyObject* held, const Such& such);

// Whether two tensors have the same dtype and device.
bool are_beside(const DLTensor& a, const DLTensor& b);

// Weight and bias, as a new tuple, of a linear layer with these attributes; null, without an error, if the layer does
// not fit the input.
PyObject* linear_of(PyObject* held, const DLTensor& input);

// The object's own attributes (`__dict__`); a new reference.
PyObject* held_by_itself(PyObject* object);

}  // namespace ckpt
