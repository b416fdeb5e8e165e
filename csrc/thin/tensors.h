// Reads torch's tensors for the Python module `_thin` by the DLPack C exchange API: a table of functions in
// `torch.Tensor.__dlpack_c_exchange_api__`. The parts that are used are declared here, in the layout of DLPack 1.x
// (https://dmlc.github.io/dlpack). Limited API of Python 3.10, and no C++ API of torch.
#pragma once

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "../direct_calls.h"

namespace ckpt {

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

// The outcome of a check; `failed` after a Python exception.
enum Answer { yes, no, failed };

// The truth of a value. Takes the reference.
Answer answer_of(PyObject* value);

// After an error: `no`, with the error cleared, if a check may meet such an error; else `failed`.
Answer no_if_exception();

// Sets the table of functions, the types of tensors, and two functions of torch: whether a tensor's elements are to be
// negated, and its offset in the storage. All are kept as long as the process lives.
void read_tensors_by(const ExchangeApi* api, PyTypeObject* tensor, PyTypeObject* parameter, PyObject* is_negative,
                     PyObject* storage_offset);
bool tensors_are_read();

// Whether only autograd intercepts ops on tensors of a type.
bool is_tensor_type(const PyTypeObject* type);
bool is_parameter_type(const PyTypeObject* type);

// Whether `object` is a plain tensor, on any device, that torch can describe in this form.
Answer describe(PyObject* object, DLTensor* tensor);

// A ckpt::ScalarKind, or a constant of direct_calls.h.
int64_t dtype_of(const DLTensor& tensor);

// Whether `object` is a plain tensor in CPU memory.
Answer read(PyObject* object, CkptTensor* tensor);

// The same for a tensor whose elements are not lazily negated.
Answer is_as_it_lies(PyObject* object, CkptTensor* tensor);

#define CKPT_FAST(function) reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL

}  // namespace ckpt
