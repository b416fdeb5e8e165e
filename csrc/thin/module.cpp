// The Python module `_thin`: calls the CPU ops of `_C` on torch's tensors without torch's dispatcher.
//
// Limited API of Python 3.10 and nothing of torch's C++: tensors are read by the DLPack C exchange API, a table of
// functions that torch.Tensor has as `__dlpack_c_exchange_api__`. Declared here is what is used of it, in the layout of
// DLPack 1.x (https://dmlc.github.io/dlpack).
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <string.h>

#include "../direct_calls.h"

namespace {

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *sizes, *strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* tensor);
  void* current_stream;
};

constexpr int cpu = 1, floating = 2, bfloat = 4;
constexpr Py_ssize_t most_arguments = 32;

const ExchangeApi* exchange = nullptr;
// The types of tensors that nothing but autograd sees.
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;
// Functions: of a tensor, whether its elements are to be negated; and, each of nothing, whether something sees all ops.
PyObject *is_negative = nullptr, *watchers = nullptr;

int64_t kind_of(const DLTensor& t) {
  if (t.lanes != 1) return -1;
  if (t.code == floating) return t.bits == 32 ? 0 : t.bits == 16 ? 2 : t.bits == 64 ? 3 : -1;
  return t.code == bfloat && t.bits == 16 ? 1 : -1;
}

// Whether `object` is a plain tensor in the CPU's memory.
bool read(PyObject* object, CkptTensor* tensor) {
  if (Py_TYPE(object) != tensor_type && Py_TYPE(object) != parameter_type) return false;
  DLTensor found;
  if (exchange->tensor_from_object(object, &found) != 0) {
    PyErr_Clear();
    return false;
  }
  if (found.device_type != cpu || !found.data) return false;
  *tensor = {static_cast<char*>(found.data) + found.byte_offset, kind_of(found), found.dim, found.sizes, found.strides};
  return true;
}

// Takes the reference. An error counts as true: it is for the full path to raise.
bool is_true(PyObject* value) {
  const int truth = value ? PyObject_IsTrue(value) : -1;
  Py_XDECREF(value);
  if (truth < 0) PyErr_Clear();
  return truth != 0;
}

bool is_watched() {
  const Py_ssize_t count = PyTuple_Size(watchers);
  for (Py_ssize_t i = 0; i < count; ++i)
    if (is_true(PyObject_CallNoArgs(PyTuple_GetItem(watchers, i)))) return true;
  return false;
}

bool is_negated(PyObject* tensor) { return is_true(PyObject_CallFunctionObjArgs(is_negative, tensor, nullptr)); }

// Whether nothing but autograd is to see what is done with these tensors, where there are such.
PyObject* is_plain(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (is_watched()) return PyBool_FromLong(0);
  CkptTensor tensor;
  for (Py_ssize_t i = 0; i < count; ++i)
    if (objects[i] != Py_None && (!read(objects[i], &tensor) || is_negated(objects[i]))) return PyBool_FromLong(0);
  return PyBool_FromLong(1);
}

// What the checks of a call depend on: the block's name, the options, and in bytes dtype and shape of each tensor. None
// where they depend on more. The arguments are (block, tensors, options); tensors may be None.
PyObject* key(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (count != 3 || !PyTuple_Check(objects[1]))
    return PyErr_Format(PyExc_TypeError, "expected (block, tensors, options)");
  constexpr int most = 64;
  int64_t words[most];
  int filled = 0;
  if (is_watched()) Py_RETURN_NONE;
  const Py_ssize_t tensors = PyTuple_Size(objects[1]);
  for (Py_ssize_t i = 0; i < tensors; ++i) {
    PyObject* object = PyTuple_GetItem(objects[1], i);
    CkptTensor tensor;
    if (object == Py_None) {
      if (filled == most) Py_RETURN_NONE;
      words[filled++] = -1;
      continue;
    }
    if (!read(object, &tensor) || is_negated(object) || filled + 2 + tensor.dim > most) Py_RETURN_NONE;
    words[filled++] = tensor.kind;
    words[filled++] = tensor.dim;
    for (int64_t dim = 0; dim < tensor.dim; ++dim) words[filled++] = tensor.sizes[dim];
  }
  PyObject* bytes = PyBytes_FromStringAndSize(reinterpret_cast<char*>(words), filled * sizeof(int64_t));
  if (!bytes) return nullptr;
  PyObject* made = PyTuple_Pack(3, objects[0], bytes, objects[2]);
  Py_DECREF(bytes);
  return made;
}

#define CKPT_FAST(function) reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL

enum Reading { done, refused, failed };

Reading read(PyObject* object, char letter, CkptArgument* argument) {
  switch (letter) {
    case 'O':
      if (object == Py_None) {
        argument->tensor.dim = -1;
        return done;
      }
      [[fallthrough]];
    case 'T':
      return read(object, &argument->tensor) ? done : refused;
    case 'd':
      argument->real = PyFloat_AsDouble(object);
      break;
    case 'b':
      argument->integer = PyObject_IsTrue(object);
      break;
    default:
      argument->integer = PyLong_AsLongLong(object);
  }
  return PyErr_Occurred() ? failed : done;
}

// An op: True if it ran; False if a tensor is none that can be read here, or none that the op takes. The full path
// knows why, and says so.
PyObject* run(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  const CkptCall* call = static_cast<const CkptCall*>(PyCapsule_GetPointer(self, nullptr));
  if (!call) return nullptr;
  if (count != Py_ssize_t(strlen(call->parameters)))
    return PyErr_Format(PyExc_TypeError, "%s was given %zd arguments; expected %zd", call->name, count,
                        Py_ssize_t(strlen(call->parameters)));
  CkptArgument arguments[most_arguments];
  for (Py_ssize_t i = 0; i < count; ++i) {
    const Reading reading = read(objects[i], call->parameters[i], &arguments[i]);
    if (reading == failed) return nullptr;
    if (reading == refused) return PyBool_FromLong(0);
  }
  PyThreadState* state = PyEval_SaveThread();
  const bool ran = call->run(arguments);
  PyEval_RestoreThread(state);
  return PyBool_FromLong(ran);
}

PyMethodDef run_definition = {"run", CKPT_FAST(run), "Runs the op; False where it did not, and results are undefined."};

// Keeps the functions and types for as long as the process lives.
PyObject* set_up(PyObject*, PyObject* arguments) {
  PyObject *api, *tensor, *parameter, *negative, *watching;
  if (!PyArg_ParseTuple(arguments, "OOOOO", &api, &tensor, &parameter, &negative, &watching)) return nullptr;
  const ExchangeApi* found = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(api, "dlpack_exchange_api"));
  if (!found) return nullptr;
  while (found && found->major > 1) found = found->previous;
  if (!found || found->major != 1 || !found->tensor_from_object)
    return PyErr_Format(PyExc_RuntimeError, "torch exchanges tensors by another version of DLPack; expected 1.x");
  if (!PyType_Check(tensor) || !PyType_Check(parameter) || !PyTuple_Check(watching))
    return PyErr_Format(PyExc_TypeError, "expected (api, type, type, function, tuple of functions)");
  Py_INCREF(tensor);
  Py_INCREF(parameter);
  Py_INCREF(negative);
  Py_INCREF(watching);
  exchange = found;
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor);
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter);
  is_negative = negative;
  watchers = watching;
  Py_RETURN_NONE;
}

PyObject* function(PyObject*, PyObject* arguments) {
  unsigned long long find;
  const char* name;
  if (!PyArg_ParseTuple(arguments, "Ks", &find, &name)) return nullptr;
  if (!exchange) return PyErr_Format(PyExc_RuntimeError, "set_up was not called");
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
     "set_up(api, tensor, parameter, is_neg, watchers): how tensors are read, which types are read, and who may see "
     "ops."},
    {"function", function, METH_VARARGS,
     "function(find, name): the op of that name; `find` is the address of ckpt_kernels_find_call in `_C`."},
    {"is_plain", CKPT_FAST(is_plain),
     "is_plain(*tensors): whether nothing but autograd is to see what is done with them."},
    {"key", CKPT_FAST(key), "key(block, tensors, options): what the checks of a call depend on; None where on more."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_thin",
                          "The CPU ops, called without torch's dispatcher.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__thin() { return PyModule_Create(&definition); }
