#include "sites.h"

#include "questions.h"

namespace ckpt {

namespace {

constexpr int cpu = 1, cuda = 2;
constexpr int64_t narrow_dtypes = 3;  // float32, bfloat16, float16

PyObject *of_activation = nullptr, *of_in_place = nullptr;
// The names under which modules hold parameters, buffers and submodules.
PyObject* of_kinds[3] = {};

// The fields of Python's `GlobalStateGuard`.
struct Quiet {
  PyObject *still, *same, *without, *empty;

  // False, with an error, if the object has another form.
  bool read(PyObject* quiet) { return read_fields(quiet, {&still, &same, &without, &empty}, 0); }
};

// Makes a check for each (holder, names).
Answer of_each(PyObject* pairs, Answer (*question)(PyObject* held, PyObject* names)) {
  Answer answer = yes;
  for (Py_ssize_t i = 0; answer == yes && i < PyTuple_Size(pairs); ++i) {
    PyObject* pair = PyTuple_GetItem(pairs, i);
    answer = is_tuple_of(pair, 2) ? question(PyTuple_GetItem(pair, 0), PyTuple_GetItem(pair, 1)) : no;
  }
  return answer;
}

Answer is_quiet(const Quiet& quiet) {
  for (Py_ssize_t i = 0; i < PyTuple_Size(quiet.still); ++i) {
    const Answer answer = answer_of(PyObject_CallNoArgs(PyTuple_GetItem(quiet.still, i)));
    if (answer != no) return answer == yes ? no : failed;
  }
  Answer answer = are_all_the_same(quiet.same, nullptr);
  if (answer == yes) answer = of_each(quiet.without, has_none);
  return answer == yes ? of_each(quiet.empty, are_empty) : answer;
}

// Whether a plain setting is unchanged; `no` if that is not certain.
Answer is_same_setting(PyObject* now, PyObject* was) {
  if (PyFloat_CheckExact(now) && PyFloat_CheckExact(was))
    return PyFloat_AsDouble(now) == PyFloat_AsDouble(was) ? yes : no;
  if (now == was) return yes;
  if (Py_TYPE(now) != Py_TYPE(was) || !(PyLong_CheckExact(now) || PyUnicode_CheckExact(now))) return no;
  const int equal = PyObject_RichCompareBool(now, was, Py_EQ);
  return equal < 0 ? failed : equal ? yes : no;
}

Answer are_same_settings(PyObject* held, PyObject* settings) {
  Answer answer = yes;
  for (Py_ssize_t i = 0; answer == yes && i < PyTuple_Size(settings); ++i) {
    PyObject* each = PyTuple_GetItem(settings, i);
    PyObject* now = is_tuple_of(each, 2) ? PyDict_GetItemWithError(held, PyTuple_GetItem(each, 0)) : nullptr;
    answer = now ? is_same_setting(now, PyTuple_GetItem(each, 1)) : PyErr_Occurred() ? failed : no;
  }
  return answer;
}

// The known form of an activation: the name of a function, or (such, settings, name) for modules of a class. A new
// reference; null without an error if the activation is unknown.
PyObject* known_form_of(PyObject* act, PyObject* activations) {
  PyObject* kind = reinterpret_cast<PyObject*>(Py_TYPE(act));
  for (Py_ssize_t i = 0; i < PyTuple_Size(activations); ++i) {
    PyObject* each = PyTuple_GetItem(activations, i);
    PyObject* key = is_tuple_of(each, 2) ? PyTuple_GetItem(each, 0) : nullptr;
    if (key == act || key == kind) {
      PyObject* known = PyTuple_GetItem(each, 1);
      Py_INCREF(known);
      return known;
    }
  }
  PyObject* known = PyObject_GetAttr(kind, of_activation);
  if (!known && PyErr_ExceptionMatches(PyExc_AttributeError)) PyErr_Clear();
  return known;
}

Answer has_known_form(PyObject* act, PyObject* known) {
  Such such;
  if (!such.read(PyTuple_GetItem(known, 0))) return failed;
  Answer answer = is_such_class(Py_TYPE(act), such);
  if (answer != yes) return answer;
  PyObject* held = held_by_itself(act);
  answer = held ? is_such_itself(held, such) : failed;
  if (answer == yes) {
    PyObject* in_place = PyDict_GetItemWithError(held, of_in_place);
    answer = !in_place ? (PyErr_Occurred() ? failed : yes) : in_place == Py_None || in_place == Py_False ? yes : no;
  }
  if (answer == yes) answer = are_same_settings(held, PyTuple_GetItem(known, 1));
  Py_XDECREF(held);
  return answer;
}

// The name of an activation, a new reference; null, perhaps without an error, if the activation is unknown.
PyObject* name_of(PyObject* act, PyObject* activations) {
  PyObject* known = known_form_of(act, activations);
  if (!known || PyUnicode_Check(known)) return known;
  PyObject* name = is_tuple_of(known, 3) && has_known_form(act, known) == yes ? PyTuple_GetItem(known, 2) : nullptr;
  Py_XINCREF(name);
  Py_DECREF(known);
  return name;
}

// Whether the object is a plain tensor of at most 32 bits an element, on a CPU or a GPU.
Answer is_narrow(PyObject* object, DLTensor* tensor) {
  const Answer answer = describe(object, tensor);
  if (answer != yes) return answer;
  const bool is_on_device = tensor->device_type == cpu || tensor->device_type == cuda;
  const int64_t dtype = dtype_of(*tensor);
  return is_on_device && dtype >= 0 && dtype < narrow_dtypes ? yes : no;
}

// A module's attribute, a new reference, looked up in torch's order; valid if the class neither defines the name nor
// customizes the lookup. Null, perhaps without an error, if there is none or the outcome is uncertain.
PyObject* attribute_of(PyObject* held, PyObject* name) {
  PyObject* value = PyDict_CheckExact(held) ? PyDict_GetItemWithError(held, name) : nullptr;
  for (int i = 0; !value && i < 3; ++i) {
    PyObject* kept = PyErr_Occurred() ? nullptr : PyDict_GetItemWithError(held, of_kinds[i]);
    if (!kept || !is_plain_dict(kept)) return nullptr;
    value = PyDict_GetItemWithError(kept, name);
  }
  Py_XINCREF(value);
  return value;
}

// The values at a call site, and the attributes of the first value.
class Values {
 public:
  Values(PyObject* const* objects, Py_ssize_t count) : objects_(objects), count_(count) {}
  ~Values() { Py_XDECREF(held_); }

  // If attributes are needed, whether loading them runs no user code.
  Answer may_load_from_first(const Such& owner) {
    if (PyTuple_Size(owner.inherited) == 0) return yes;
    if (count_ == 0) return no;
    const Answer answer = is_such_class(Py_TYPE(objects_[0]), owner);
    if (answer == yes) held_ = held_by_itself(objects_[0]);
    return answer == yes && !held_ ? failed : answer;
  }

  // A new reference; null, perhaps without an error, if there is none.
  PyObject* at(PyObject* place_or_name) {
    if (PyUnicode_Check(place_or_name)) return held_ ? attribute_of(held_, place_or_name) : nullptr;
    const Py_ssize_t place = PyLong_AsSsize_t(place_or_name);
    if (place < 0 || place >= count_) return nullptr;
    Py_INCREF(objects_[place]);
    return objects_[place];
  }

 private:
  PyObject* const* objects_;
  Py_ssize_t count_;
  PyObject* held_ = nullptr;
};

// Reads the operands of one call site. All linear layers read the first tensor.
class Operands {
 public:
  Operands(PyObject* linear, PyObject* activations) : linear_(linear), activations_(activations) {}

  // A new reference; null, perhaps without an error, if the object is not of the kind that the letter says.
  PyObject* read(PyObject* object, Py_UCS4 letter) {
    if (letter == 'a') return name_of(object, activations_);
    if (letter == 'l') return weights_of(object);
    if (letter != 'o' && !(letter == 't' && is_tensor(object))) return nullptr;
    Py_INCREF(object);
    return object;
  }

 private:
  bool is_tensor(PyObject* object) {
    DLTensor tensor;
    if (is_narrow(object, &tensor) != yes) return false;
    if (!has_input_) input_ = tensor;
    return has_input_ = true;
  }

  PyObject* weights_of(PyObject* module) {
    if (!has_input_) return nullptr;
    if (Py_TYPE(module) != kind_) {  // each class is checked once
      if ((!kind_ && !such_.read(linear_)) || is_such_class(Py_TYPE(module), such_) != yes) return nullptr;
      kind_ = Py_TYPE(module);
    }
    PyObject* held = held_by_itself(module);
    PyObject* pair = held && is_such_itself(held, such_) == yes ? linear_of(held, input_) : nullptr;
    Py_XDECREF(held);
    return pair;
  }

  PyObject *linear_, *activations_;
  Such such_;
  PyTypeObject* kind_ = nullptr;
  DLTensor input_;
  bool has_input_ = false;
};

}  // namespace

PyObject* operands(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  constexpr Py_ssize_t first = 5;
  Quiet quiet;
  Such owner;
  if (count < first || !PyTuple_Check(objects[3]) || !PyTuple_Check(objects[4]))
    return PyErr_Format(PyExc_TypeError, "expected (quiet, owner, linear, activations, wanted, *values)");
  if (!quiet.read(objects[0]) || !owner.read(objects[1])) return nullptr;
  Values values(objects + first, count - first);
  PyObject* wanted = objects[4];
  const Py_ssize_t size = PyTuple_Size(wanted);
  const bool is_known = is_quiet(quiet) == yes && values.may_load_from_first(owner) == yes;
  PyObject* found = is_known ? PyTuple_New(size) : nullptr;
  Operands reader(objects[2], objects[3]);
  for (Py_ssize_t i = 0; found && i < size; ++i) {
    PyObject* each = PyTuple_GetItem(wanted, i);
    PyObject* value = is_tuple_of(each, 2) ? values.at(PyTuple_GetItem(each, 0)) : nullptr;
    PyObject* operand = value ? reader.read(value, PyUnicode_ReadChar(PyTuple_GetItem(each, 1), 0)) : nullptr;
    Py_XDECREF(value);
    if (!operand || PyTuple_SetItem(found, i, operand) != 0) {
      Py_DECREF(found);
      found = nullptr;
    }
  }
  if (found) return found;
  // Python will raise an exception of this path again.
  if (PyErr_Occurred() && no_if_exception() == failed) return nullptr;
  Py_RETURN_NONE;
}

bool prepare_sites() {
  of_activation = PyUnicode_InternFromString("_ckpt_activation");
  of_in_place = PyUnicode_InternFromString("inplace");
  of_kinds[0] = PyUnicode_InternFromString("_parameters");
  of_kinds[1] = PyUnicode_InternFromString("_buffers");
  of_kinds[2] = PyUnicode_InternFromString("_modules");
  return of_activation && of_in_place && of_kinds[0] && of_kinds[1] && of_kinds[2];
}

}  // namespace ckpt
