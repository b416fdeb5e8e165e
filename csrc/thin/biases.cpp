#include "biases.h"

#include "members.h"
#include "questions.h"

namespace ckpt {

namespace {

PyObject *of_modules, *of_parameters;

// Adds (parameter, version, address) under the parameter's identity if the parameter is a bias; `no` if Python must
// decide.
Answer add_if_bias(PyObject* parameter, PyObject* versions) {
  DLTensor described;
  if (!is_parameter_type(Py_TYPE(parameter))) return no;
  const Answer answer = describe(parameter, &described);
  if (answer != yes || described.dim >= 2) return answer;
  const Owned version = tensor_members.version.of(parameter);
  const Owned address(version ? PyLong_FromVoidPtr(static_cast<char*>(described.data) + described.byte_offset)
                              : nullptr);
  const Owned identity(address ? PyLong_FromVoidPtr(parameter) : nullptr);
  const Owned entry(identity ? PyTuple_Pack(3, parameter, version.get(), address.get()) : nullptr);
  return entry && PyDict_SetItem(versions, identity.get(), entry.get()) == 0 ? yes : failed;
}

// The dict that a module holds under a name; null, perhaps without an error, if there is none.
Owned dict_under(const Owned& held, PyObject* name) {
  PyObject* values = PyDict_CheckExact(held.get()) ? PyDict_GetItemWithError(held.get(), name) : nullptr;
  return shared(values && is_plain_dict(values) ? values : nullptr);
}

Answer add_all_in(PyObject* module, PyObject* versions, PyObject* seen);

// Adds the biases of all submodules.
Answer add_all_below(const Owned& modules, PyObject* versions, PyObject* seen) {
  const Owned children(PyDict_Values(modules.get()));
  Answer answer = children ? yes : failed;
  for (Py_ssize_t i = 0; answer == yes && i < PyList_Size(children.get()); ++i) {
    PyObject* child = PyList_GetItem(children.get(), i);
    if (child != Py_None) answer = add_all_in(child, versions, seen);
  }
  return answer;
}

Answer add_all_in(PyObject* module, PyObject* versions, PyObject* seen) {
  const Owned held(held_by_itself(module));
  if (!held) return failed;
  const Owned parameters = dict_under(held, of_parameters);
  const Owned children = parameters ? dict_under(held, of_modules) : Owned();
  if (!children) return PyErr_Occurred() ? failed : no;
  // No code in Python runs in this loop.
  Py_ssize_t at = 0;
  PyObject *name, *parameter;
  while (PyDict_Next(parameters.get(), &at, &name, &parameter)) {
    const Answer answer = parameter == Py_None ? yes : add_if_bias(parameter, versions);
    if (answer != yes) return answer;
  }
  if (PyDict_Size(children.get()) == 0) return yes;
  const int was_seen = PySet_Contains(seen, module);
  if (was_seen != 0) return was_seen < 0 ? failed : yes;
  if (PySet_Add(seen, module) != 0 || Py_EnterRecursiveCall(" in a module's children") != 0) return failed;
  const Answer answer = add_all_below(children, versions, seen);
  Py_LeaveRecursiveCall();
  return answer;
}

PyObject* biases(PyObject*, PyObject* module) {
  Owned versions(PyDict_New());
  const Owned seen(PySet_New(nullptr));
  if (!versions || !seen) return nullptr;
  const Answer answer = add_all_in(module, versions.get(), seen.get());
  if (answer == yes) return versions.release();
  if (answer == failed && no_if_exception() == failed) return nullptr;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"biases", biases, METH_O,
     "biases(module): (parameter, version, address) of the parameters of at most one dimension in a module and its "
     "submodules, by identity; None where Python must decide."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_biases(PyObject* module) {
  return prepare_names({{&of_modules, "_modules"}, {&of_parameters, "_parameters"}}) &&
         PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace ckpt
