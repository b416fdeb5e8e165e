#include "untracked.h"

#include <structmember.h>
#include <string.h>

#include <array>
#include <cstddef>

namespace ckpt {

namespace {

constexpr Py_ssize_t most_fields = 6;

struct Object {
  PyObject_HEAD PyObject* references;
  PyObject* fields[most_fields];
};

constexpr Py_ssize_t size_of(Py_ssize_t count) { return offsetof(Object, fields) + count * sizeof(PyObject*); }

template <Py_ssize_t count>
void deallocate(PyObject* self) {
  Object* object = reinterpret_cast<Object*>(self);
  if (object->references) PyObject_ClearWeakRefs(self);
  for (Py_ssize_t i = 0; i < count; ++i) Py_XDECREF(object->fields[i]);
  PyTypeObject* type = Py_TYPE(self);
  PyObject_Free(self);
  Py_DECREF(type);
}

constexpr std::array<destructor, most_fields + 1> deallocators = {
    deallocate<0>, deallocate<1>, deallocate<2>, deallocate<3>, deallocate<4>, deallocate<5>, deallocate<6>};

// A copy of a name, which is kept as long as the process lives; null after an error.
const char* kept_copy(PyObject* name) {
  const Owned bytes(PyUnicode_AsUTF8String(name));
  const char* text = bytes ? PyBytes_AsString(bytes.get()) : nullptr;
  return text ? strdup(text) : nullptr;
}

PyObject* untracked(PyObject*, PyObject* const* names, Py_ssize_t count) {
  const Py_ssize_t fields = count - 1;
  if (fields < 0 || fields > most_fields)
    return PyErr_Format(PyExc_ValueError, "%zd attributes; expected a name, and at most %zd", fields, most_fields);
  PyMemberDef members[most_fields + 2] = {
      {"__weaklistoffset__", T_PYSSIZET, offsetof(Object, references), READONLY, nullptr}};
  for (Py_ssize_t i = 0; i < fields; ++i) {
    members[i + 1] = {kept_copy(names[i + 1]), T_OBJECT_EX, size_of(i), 0, nullptr};
    if (!members[i + 1].name) return nullptr;
  }
  PyType_Slot slots[] = {
      {Py_tp_dealloc, reinterpret_cast<void*>(deallocators[fields])}, {Py_tp_members, members}, {0, nullptr}};
  PyType_Spec specification = {kept_copy(names[0]), int(size_of(fields)), 0, Py_TPFLAGS_DEFAULT, slots};
  return specification.name ? PyType_FromSpec(&specification) : nullptr;
}

PyMethodDef methods[] = {
    {"untracked", CKPT_FAST(untracked),
     "untracked(name, *attributes): a class whose objects the cyclic garbage collector does not know."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_untracked(PyObject* module) { return PyModule_AddFunctions(module, methods) == 0; }

}  // namespace ckpt
