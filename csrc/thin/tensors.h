// How the Python module `_thin` reads torch's tensors: by the DLPack C exchange API, a table of functions that
// torch.Tensor has as `__dlpack_c_exchange_api__`. Declared here is what is used of it, in the layout of DLPack 1.x
// (https://dmlc.github.io/dlpack).
//
// Limited API of Python 3.10 and nothing of torch's C++.
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

// What came of a question: `failed` where Python has raised.
enum Answer { yes, no, failed };

// Takes the reference.
Answer answer_of(PyObject* value);

// After an error: no if it is one that a question may meet; the error is cleared then.
Answer no_if_exception();

// From now on tensors are read by this table, of these types, and with these functions of torch's: of a tensor, whether
// its elements are to be negated, and where in its storage it begins. All are kept for as long as the process lives.
void read_tensors_by(const ExchangeApi* api, PyTypeObject* tensor, PyTypeObject* parameter, PyObject* is_negative,
                     PyObject* storage_offset);
bool tensors_are_read();

// Whether tensors of a type are seen by nothing but autograd.
bool is_tensor_type(const PyTypeObject* type);
bool is_parameter_type(const PyTypeObject* type);

// Whether `object` is a plain tensor that torch can describe so, on any device.
Answer describe(PyObject* object, DLTensor* tensor);

// A ckpt::ScalarKind, or one of those in direct_calls.h.
int64_t dtype_of(const DLTensor& tensor);

// Whether `object` is a plain tensor with memory of the CPU's.
Answer read(PyObject* object, CkptTensor* tensor);

// The same of one whose memory holds its elements as they are.
Answer is_as_it_lies(PyObject* object, CkptTensor* tensor);

#define CKPT_FAST(function) reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL

}  // namespace ckpt
