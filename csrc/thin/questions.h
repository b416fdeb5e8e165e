// What may be asked of code, classes, modules and tensors: the parts that the guards of converted models are made of.
#pragma once

#include <initializer_list>

#include "tensors.h"

namespace ckpt {

// Finds what the questions name; false after an error.
bool prepare_questions();

// Whether no load from it runs anybody's code.
bool is_plain_dict(PyObject* object);

// Whether the holder has this very value under the name. `missing`, which may be null, stands for what is not there.
Answer has(PyObject* holder, PyObject* name, PyObject* value, PyObject* missing);

// The same of each (holder, name, value).
Answer are_all_the_same(PyObject* found, PyObject* missing);

// Whether none of the names is in the dict, or mapping.
Answer has_none(PyObject* held, PyObject* names);

// Whether there is a dict with nothing in it under each of the names.
Answer are_empty(PyObject* held, PyObject* names);

bool is_tuple_of(PyObject* object, Py_ssize_t size);

// The fields of a tuple, of which those from the given one on are tuples too; false, and an error, where they are not.
bool read_fields(PyObject* object, std::initializer_list<PyObject**> fields, Py_ssize_t tuples_from);

// The fields of Python's `ModuleGuard`.
struct Such {
  PyTypeObject* kind;
  PyObject *of_class, *same, *inherited, *empty, *absent;

  // False, and an error, where it is none.
  bool read(PyObject* such) {
    PyObject* kind_object;
    if (!read_fields(such, {&kind_object, &of_class, &same, &inherited, &empty, &absent}, 1)) return false;
    if (!PyType_Check(kind_object)) return PyErr_Format(PyExc_TypeError, "expected a class first") != nullptr;
    kind = reinterpret_cast<PyTypeObject*>(kind_object);
    return true;
  }
};

// Of a class alone, and of what a module holds itself.
Answer is_such_class(PyTypeObject* type, const Such& such);
Answer is_such_itself(PyObject* held, const Such& such);

// Of a dtype and on a device.
bool are_beside(const DLTensor& a, const DLTensor& b);

// Weight and bias, as a new tuple, of a linear layer that holds these; null, without an error, where it is none that
// reads such an input.
PyObject* linear_of(PyObject* held, const DLTensor& input);

// What an object holds itself; a new reference.
PyObject* held_by_itself(PyObject* object);

}  // namespace ckpt
