// The Python module `_thin`: calls the CPU ops of `_C` on torch's tensors without torch's dispatcher.
//
// Limited API of Python 3.10 and nothing of torch's C++: tensors are read by the DLPack C exchange API, a table of
// functions that torch.Tensor has as `__dlpack_c_exchange_api__`. Declared here is what is used of it, in the layout of
// DLPack 1.x (https://dmlc.github.io/dlpack).
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <string.h>

#include <initializer_list>

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

constexpr int cpu = 1, integer = 0, floating = 2, bfloat = 4;
constexpr Py_ssize_t most_arguments = 32;

const ExchangeApi* exchange = nullptr;
// The types of tensors that nothing but autograd sees.
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;
// That of shapes, which are tuples.
PyTypeObject* size_type = nullptr;
// Functions: of a tensor, whether its elements are to be negated, and where in its storage it begins; and, each of
// nothing, whether something sees all ops.
PyObject *is_negative = nullptr, *storage_offset = nullptr, *watchers = nullptr;

// What came of a question: `failed` where Python has raised.
enum Answer { yes, no, failed };

// Takes the reference.
Answer answer_of(PyObject* value) {
  const int truth = value ? PyObject_IsTrue(value) : -1;
  Py_XDECREF(value);
  return truth < 0 ? failed : truth ? yes : no;
}

int64_t dtype_of(const DLTensor& t) {
  if (t.lanes != 1) return ckpt_other_dtype;
  if (t.code == floating) return t.bits == 32 ? 0 : t.bits == 16 ? 2 : t.bits == 64 ? 3 : ckpt_other_dtype;
  if (t.code == bfloat && t.bits == 16) return 1;
  return t.code == integer && t.bits == 64 ? int64_t(ckpt_int64) : int64_t(ckpt_other_dtype);
}

// Whether the tensor's storage was freed. Then its address is the offset in the storage and no more, below all that a
// process is given: only for one so low, which some systems do give, is torch asked.
Answer is_freed(PyObject* object, const DLTensor& t) {
  if (!t.data) return yes;
  const uintptr_t address = reinterpret_cast<uintptr_t>(t.data);
  if (address >> 40) return no;
  PyObject* offset = PyObject_CallFunctionObjArgs(storage_offset, object, nullptr);
  const long long elements = offset ? PyLong_AsLongLong(offset) : -1;
  Py_XDECREF(offset);
  if (elements < 0) return failed;
  return address == uintptr_t(elements) * (t.bits / 8) ? yes : no;
}

// Whether `object` is a plain tensor with memory of the CPU's.
Answer read(PyObject* object, CkptTensor* tensor) {
  if (Py_TYPE(object) != tensor_type && Py_TYPE(object) != parameter_type) return no;
  DLTensor found;
  if (exchange->tensor_from_object(object, &found) != 0) {
    // Torch has no such description of this tensor, which may be a sparse one. What is no such error is not ours.
    if (!PyErr_ExceptionMatches(PyExc_Exception)) return failed;
    PyErr_Clear();
    return no;
  }
  if (found.device_type != cpu) return no;
  const Answer freed = is_freed(object, found);
  if (freed != no) return freed == yes ? no : failed;
  *tensor = {static_cast<char*>(found.data) + found.byte_offset, dtype_of(found), found.dim, found.sizes,
             found.strides};
  return yes;
}

Answer is_watched() {
  const Py_ssize_t count = PyTuple_Size(watchers);
  for (Py_ssize_t i = 0; i < count; ++i) {
    const Answer answer = answer_of(PyObject_CallNoArgs(PyTuple_GetItem(watchers, i)));
    if (answer != no) return answer;
  }
  return no;
}

// Whether `object` is a plain tensor whose memory holds its elements as they are.
Answer is_as_it_lies(PyObject* object, CkptTensor* tensor) {
  const Answer answer = read(object, tensor);
  if (answer != yes) return answer;
  const Answer negated = answer_of(PyObject_CallFunctionObjArgs(is_negative, object, nullptr));
  return negated == failed ? failed : negated == yes ? no : yes;
}

// Whether nothing but autograd is to see what is done with these tensors, where there are such.
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

// The words that a key is made of. Each list of them tells where it ends, so that no two calls have the same.
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

// False of a dimension of one element whose stride is not that of a contiguous tensor. It says nothing of where
// elements lie, but torch's ways of making a tensor like this one differ in what they make of it.
bool has_usual_strides(const CkptTensor& t) {
  int64_t stride = 1;
  for (int64_t i = t.dim - 1; i >= 0; --i) {
    if (t.sizes[i] == 1 && t.strides[i] != stride) return false;
    stride *= t.sizes[i];
  }
  return true;
}

// Dtype and shape of each; no where a tensor is none that the checks know by these alone.
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

// The types of the options: some that are equal, as 1 and 1.0 are, differ to the checks. No for one of a type that may
// have changed and be equal to what it was.
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

// What the checks of a call depend on: the block's name, the options, and in bytes dtype and shape of each tensor and
// the options' types. None where they depend on more. The arguments are (block, tensors, options); tensors may be None.
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

#define CKPT_FAST(function) reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL

Answer read(PyObject* object, char letter, CkptArgument* argument) {
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
    const Answer answer = read(objects[i], call->parameters[i], &arguments[i]);
    if (answer != yes) return answer == no ? PyBool_FromLong(0) : nullptr;
  }
  PyThreadState* state = PyEval_SaveThread();
  const bool ran = call->run(arguments);
  PyEval_RestoreThread(state);
  return PyBool_FromLong(ran);
}

PyMethodDef run_definition = {"run", CKPT_FAST(run), "Runs the op; False where it did not, and results are undefined."};

// Keeps the functions and types for as long as the process lives.
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
  for (PyObject* kept : {tensor, parameter, size, negative, offset, watching}) Py_INCREF(kept);
  exchange = found;
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor);
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter);
  size_type = reinterpret_cast<PyTypeObject*>(size);
  is_negative = negative;
  storage_offset = offset;
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
     "set_up(api, tensor, parameter, size, is_neg, storage_offset, watchers): how tensors are read, which types of "
     "tensors and of shapes there are, what is asked of a tensor, and who may see ops."},
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
