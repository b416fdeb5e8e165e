#include "tensors.h"

namespace ckpt {

namespace {

constexpr int cpu = 1, integer = 0, floating = 2, bfloat = 4;

const ExchangeApi* exchange = nullptr;
// The types of tensors on which only autograd intercepts ops.
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;
PyObject *is_negative = nullptr, *storage_offset = nullptr;

// Whether the tensor's storage was freed. The address is then only the offset in the storage, below all addresses of a
// process. torch is asked only for such a low address, which some systems do use.
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

}  // namespace

Answer answer_of(PyObject* value) {
  const int truth = value ? PyObject_IsTrue(value) : -1;
  Py_XDECREF(value);
  return truth < 0 ? failed : truth ? yes : no;
}

Answer no_if_exception() {
  if (!PyErr_ExceptionMatches(PyExc_Exception)) return failed;
  PyErr_Clear();
  return no;
}

void read_tensors_by(const ExchangeApi* api, PyTypeObject* tensor, PyTypeObject* parameter, PyObject* negative,
                     PyObject* offset) {
  Py_INCREF(tensor);
  Py_INCREF(parameter);
  Py_INCREF(negative);
  Py_INCREF(offset);
  exchange = api;
  tensor_type = tensor;
  parameter_type = parameter;
  is_negative = negative;
  storage_offset = offset;
}

bool tensors_are_read() { return exchange != nullptr; }

bool is_tensor_type(const PyTypeObject* type) { return type == tensor_type || type == parameter_type; }

bool is_parameter_type(const PyTypeObject* type) { return type == parameter_type; }

int64_t dtype_of(const DLTensor& t) {
  if (t.lanes != 1) return ckpt_other_dtype;
  if (t.code == floating) return t.bits == 32 ? 0 : t.bits == 16 ? 2 : t.bits == 64 ? 3 : int64_t(ckpt_other_dtype);
  if (t.code == bfloat && t.bits == 16) return 1;
  return t.code == integer && t.bits == 64 ? int64_t(ckpt_int64) : int64_t(ckpt_other_dtype);
}

Answer describe(PyObject* object, DLTensor* tensor) {
  if (!is_tensor_type(Py_TYPE(object))) return no;
  // torch cannot describe some tensors in this form, such as sparse ones. Other errors are passed on.
  return exchange->tensor_from_object(object, tensor) == 0 ? yes : no_if_exception();
}

Answer read(PyObject* object, CkptTensor* tensor) {
  DLTensor found;
  const Answer described = describe(object, &found);
  if (described != yes) return described;
  if (found.device_type != cpu) return no;
  const Answer freed = is_freed(object, found);
  if (freed != no) return freed == yes ? no : failed;
  *tensor = {static_cast<char*>(found.data) + found.byte_offset, dtype_of(found), found.dim, found.sizes,
             found.strides};
  return yes;
}

Answer is_as_it_lies(PyObject* object, CkptTensor* tensor) {
  const Answer answer = read(object, tensor);
  if (answer != yes) return answer;
  const Answer negated = answer_of(PyObject_CallFunctionObjArgs(is_negative, object, nullptr));
  return negated == failed ? failed : negated == yes ? no : yes;
}

}  // namespace ckpt
