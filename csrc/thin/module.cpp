// The Python module `_thin`: calls the CPU ops of `_C` on torch's tensors without torch's dispatcher (direct_calls.h),
// checks small calls and converted models at each call (guards, questions, sites), and packs, records and unpacks
// tensors for discarded outputs (cells, graph, records, unpacking, storages, biases; classes, slots and untracked).
// Limited API of Python 3.10, and no C++ API of torch; tensors.h and members.h read tensors.
#include "tensors.h"

#include <string.h>

#include "biases.h"
#include "cells.h"
#include "classes.h"
#include "guards.h"
#include "held.h"
#include "members.h"
#include "records.h"
#include "storages.h"
#include "unpacking.h"
#include "untracked.h"

using namespace ckpt;

namespace {

constexpr Py_ssize_t most_arguments = 32;

// The type of shapes, which are tuples.
PyTypeObject* size_type = nullptr;
// Functions without arguments, which tell whether something intercepts every op.
PyObject* watchers = nullptr;

Answer is_watched() {
  const Py_ssize_t count = PyTuple_Size(watchers);
  for (Py_ssize_t i = 0; i < count; ++i) {
    const Answer answer = answer_of(PyObject_CallNoArgs(PyTuple_GetItem(watchers, i)));
    if (answer != no) return answer;
  }
  return no;
}

// Whether all tensors are None or plain, and only autograd intercepts ops.
PyObject* is_plain(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  const Answer watched = is_watched();
  if (watched != no) return watched == yes ? PyBool_FromLong(0) : nullptr;
  CkptTensor tensor;
  for (Py_ssize_t i = 0; i < count; ++i) {
    const Answer answer = objects[i] == Py_None ? yes : is_as_it_lies(objects[i], &tensor);
    if (answer != yes) return answer == no ? PyBool_FromLong(0) : nullptr;
  }
  return PyBool_FromLong(1);
}

// The words of a key. Each list in a key shows where the list ends, so that different calls have different keys.
class Words {
 public:
  void add(int64_t word) {
    if (filled_ < most) words_[filled_] = word;
    ++filled_;
  }
  bool fit() const { return filled_ <= most; }
  PyObject* bytes() const {
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words_), filled_ * sizeof(int64_t));
  }

 private:
  static constexpr int most = 64;
  int64_t words_[most];
  int filled_ = 0;
};

// False if a dimension of one element has another stride than in a contiguous tensor. Such a stride does not change
// where elements are, but torch's functions for creating a similar tensor treat it differently.
bool has_usual_strides(const CkptTensor& t) {
  int64_t stride = 1;
  for (int64_t i = t.dim - 1; i >= 0; --i) {
    if (t.sizes[i] == 1 && t.strides[i] != stride) return false;
    stride *= t.sizes[i];
  }
  return true;
}

// Adds dtype and shape of each tensor; `no` if the checks depend on more for a tensor.
Answer describe_tensors(PyObject* tensors, Words* words) {
  const Py_ssize_t count = PyTuple_Size(tensors);
  words->add(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* object = PyTuple_GetItem(tensors, i);
    if (object == Py_None) {
      words->add(ckpt_other_dtype);
      continue;
    }
    CkptTensor tensor;
    const Answer answer = is_as_it_lies(object, &tensor);
    if (answer != yes) return answer;
    if (tensor.dtype == ckpt_other_dtype || !has_usual_strides(tensor)) return no;
    words->add(tensor.dtype);
    words->add(tensor.dim);
    for (int64_t dim = 0; dim < tensor.dim; ++dim) words->add(tensor.sizes[dim]);
  }
  return yes;
}

// Adds the types of the options, because some options are equal but of different types, such as 1 and 1.0. False for an
// option of a type whose objects may be changed and still compare as equal.
bool describe_options(PyObject* options, Words* words) {
  PyTypeObject* const values[] = {&PyUnicode_Type, &PyLong_Type, &PyFloat_Type, &PyBool_Type, Py_TYPE(Py_None)};
  const Py_ssize_t count = PyTuple_Size(options);
  int64_t types = 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* option = PyTuple_GetItem(options, i);
    PyTypeObject* type = Py_TYPE(option);
    int64_t code = 0;
    while (code < 5 && values[code] != type) ++code;
    if (code == 5) {
      if ((type != &PyTuple_Type && type != size_type) || !describe_options(option, words)) return false;
    }
    types = types * 8 + code + 1;
    if (i % 20 == 19 || i == count - 1) {
      words->add(types);
      types = 0;
    }
  }
  return true;
}

// The key of a call: the block's name, the options, and as bytes the dtype and shape of each tensor and the types of
// the options. None if the checks depend on more. The arguments are (block, tensors, options); tensors may be None.
PyObject* key(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (count != 3 || !PyTuple_Check(objects[1]) || !PyTuple_Check(objects[2]))
    return PyErr_Format(PyExc_TypeError, "expected (block, tensors, options)");
  const Answer watched = is_watched();
  if (watched == failed) return nullptr;
  Words words;
  if (watched == yes || !describe_options(objects[2], &words)) Py_RETURN_NONE;
  const Answer described = describe_tensors(objects[1], &words);
  if (described == failed) return nullptr;
  if (described == no || !words.fit()) Py_RETURN_NONE;
  PyObject* bytes = words.bytes();
  if (!bytes) return nullptr;
  PyObject* made = PyTuple_Pack(3, objects[0], bytes, objects[2]);
  Py_DECREF(bytes);
  return made;
}

Answer read_as(PyObject* object, char letter, CkptArgument* argument) {
  switch (letter) {
    case 'O':
      if (object == Py_None) {
        argument->tensor.dim = -1;
        return yes;
      }
      [[fallthrough]];
    case 'T':
      return read(object, &argument->tensor);
    case 'd':
      argument->real = PyFloat_AsDouble(object);
      break;
    case 'b':
      argument->integer = PyObject_IsTrue(object);
      break;
    default:
      argument->integer = PyLong_AsLongLong(object);
  }
  return PyErr_Occurred() ? failed : yes;
}

// Runs an op: True if the op ran; False if a tensor cannot be read here, or does not suit the op. The full path then
// raises the error that explains why.
PyObject* run(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  const CkptCall* call = static_cast<const CkptCall*>(PyCapsule_GetPointer(self, nullptr));
  if (!call) return nullptr;
  if (count != Py_ssize_t(strlen(call->parameters)))
    return PyErr_Format(PyExc_TypeError, "%s was given %zd arguments; expected %zd", call->name, count,
                        Py_ssize_t(strlen(call->parameters)));
  CkptArgument arguments[most_arguments];
  for (Py_ssize_t i = 0; i < count; ++i) {
    const Answer answer = read_as(objects[i], call->parameters[i], &arguments[i]);
    if (answer != yes) return answer == no ? PyBool_FromLong(0) : nullptr;
  }
  PyThreadState* state = PyEval_SaveThread();
  const bool ran = call->run(arguments);
  PyEval_RestoreThread(state);
  return PyBool_FromLong(ran);
}

PyMethodDef run_definition = {"run", CKPT_FAST(run),
                              "Runs the op; False, with undefined results, if the op did not run."};

// Keeps the functions and types as long as the process lives.
PyObject* set_up(PyObject*, PyObject* arguments) {
  PyObject *api, *tensor, *parameter, *size, *negative, *offset, *watching;
  if (!PyArg_ParseTuple(arguments, "OOOOOOO", &api, &tensor, &parameter, &size, &negative, &offset, &watching))
    return nullptr;
  const ExchangeApi* found = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(api, "dlpack_exchange_api"));
  if (!found) return nullptr;
  while (found && found->major > 1) found = found->previous;
  if (!found || found->major != 1 || !found->tensor_from_object)
    return PyErr_Format(PyExc_RuntimeError, "torch exchanges tensors by another version of DLPack; expected 1.x");
  if (!PyType_Check(tensor) || !PyType_Check(parameter) || !PyType_Check(size) || !PyTuple_Check(watching))
    return PyErr_Format(PyExc_TypeError, "expected (api, type, type, type, function, function, tuple of functions)");
  if (!tensor_members.find(reinterpret_cast<PyTypeObject*>(tensor))) return nullptr;
  read_tensors_by(found, reinterpret_cast<PyTypeObject*>(tensor), reinterpret_cast<PyTypeObject*>(parameter), negative,
                  offset);
  Py_INCREF(size);
  Py_INCREF(watching);
  size_type = reinterpret_cast<PyTypeObject*>(size);
  watchers = watching;
  Py_RETURN_NONE;
}

PyObject* function(PyObject*, PyObject* arguments) {
  unsigned long long find;
  const char* name;
  if (!PyArg_ParseTuple(arguments, "Ks", &find, &name)) return nullptr;
  if (!tensors_are_read()) return PyErr_Format(PyExc_RuntimeError, "set_up was not called");
  const CkptCall* call = reinterpret_cast<CkptFind>(uintptr_t(find))(name);
  if (!call || Py_ssize_t(strlen(call->parameters)) > most_arguments)
    return PyErr_Format(PyExc_LookupError, "the CPU library has no op %s that can be called directly", name);
  PyObject* self = PyCapsule_New(const_cast<CkptCall*>(call), nullptr, nullptr);
  if (!self) return nullptr;
  PyObject* made = PyCFunction_New(&run_definition, self);
  Py_DECREF(self);
  return made;
}

PyMethodDef methods[] = {
    {"set_up", set_up, METH_VARARGS,
     "set_up(api, tensor, parameter, size, is_neg, storage_offset, watchers): the table that reads tensors, the types "
     "of tensors and shapes, two functions of a tensor, and functions that tell whether anything intercepts ops."},
    {"function", function, METH_VARARGS,
     "function(find, name): the op of that name; `find` is the address of ckpt_kernels_find_call in `_C`."},
    {"is_plain", CKPT_FAST(is_plain),
     "is_plain(*tensors): whether all tensors are plain or None, and only autograd intercepts ops."},
    {"key", CKPT_FAST(key),
     "key(block, tensors, options): everything that the checks of a call depend on; None if they depend on more."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_thin",
                          "The CPU ops without torch's dispatcher, checks of calls, and packing and recording in C.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

bool add_all(PyObject* module) {
  return add_guards(module) && add_classes(module) && add_cells(module) && add_records(module) &&
         add_storages(module) && add_unpacking(module) && add_biases(module) && add_untracked(module) &&
         add_held(module);
}

}  // namespace

PyMODINIT_FUNC PyInit__thin() {
  PyObject* module = PyModule_Create(&definition);
  if (module && !add_all(module)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
