#include "held.h"

#include "members.h"
#include "questions.h"

namespace ckpt {

namespace {

PyObject *of_buffers, *of_modules, *of_parameters;

bool append(const Owned& list, PyObject* value) { return PyList_Append(list.get(), value) == 0; }

// Whether a value of such a type cannot hold a tensor.
bool is_plain_type(const PyTypeObject* type) {
  return type == Py_TYPE(Py_None) || type == &PyBool_Type || type == &PyLong_Type || type == &PyFloat_Type ||
         type == &PyComplex_Type || type == &PyUnicode_Type || type == &PyBytes_Type;
}

// The arguments of `held`, and the lists that it returns.
class Walk {
 public:
  // `objects` are the arguments.
  explicit Walk(PyObject* const* objects)
      : container_names_(objects[1]),
        of_torch_(objects[2]),
        tensor_(objects[3]),
        generator_(objects[4]),
        not_held_(objects[5]) {}

  // `no` if Python must decide.
  Answer walk(PyObject* layer) {
    for (Owned* list : {&modules_, &parameters_, &buffers_, &generators_, &attributes_, &containers_, &partial_}) {
      *list = Owned(PyList_New(0));
      if (!*list) return failed;
    }
    nothing_ = Owned(PyDict_New());
    const Owned seen(PySet_New(nullptr)), waiting(PyList_New(0));
    if (!nothing_ || !seen || !waiting || !append(waiting, layer)) return failed;
    Answer answer = yes;
    for (Py_ssize_t i = 0; answer == yes && i < PyList_Size(waiting.get()); ++i) {
      PyObject* module = PyList_GetItem(waiting.get(), i);
      const int was_seen = PySet_Contains(seen.get(), module);
      if (was_seen == 1) continue;
      if (was_seen < 0 || PySet_Add(seen.get(), module) != 0 || !append(modules_, module)) return failed;
      answer = add(module, waiting);
    }
    return answer;
  }

  PyObject* found() const {
    const Owned copies(PyTuple_Pack(3, attributes_.get(), containers_.get(), partial_.get()));
    return copies ? PyTuple_Pack(5, modules_.get(), parameters_.get(), buffers_.get(), generators_.get(), copies.get())
                  : nullptr;
  }

 private:
  Answer add(PyObject* module, const Owned& waiting) {
    const Owned own(held_by_itself(module));
    if (!own || !PyDict_CheckExact(own.get())) return own ? no : failed;
    for (PyObject* names : {of_parameters, of_buffers, of_modules}) {
      const Owned values = values_under(own, names);
      if (!values) return PyErr_Occurred() ? failed : no;
      for (Py_ssize_t i = 0; i < PyList_Size(values.get()); ++i) {
        PyObject* value = PyList_GetItem(values.get(), i);
        if (value == Py_None) continue;
        // A tensor of another class may be lazy.
        if (names != of_modules && !is_tensor_type(Py_TYPE(value))) return no;
        const Owned pair(names == of_buffers ? PyTuple_Pack(2, value, module) : nullptr);
        if (names == of_buffers && !pair) return failed;
        const Owned& list = names == of_modules ? waiting : names == of_buffers ? buffers_ : parameters_;
        if (!append(list, pair ? pair.get() : value)) return failed;
      }
    }
    if (!add_copy(attributes_, own.get(), true, module)) return failed;
    for (Py_ssize_t i = 0; i < PyTuple_Size(container_names_); ++i) {
      PyObject* name = PyTuple_GetItem(container_names_, i);
      PyObject* container = PyDict_GetItemWithError(own.get(), name);
      if (!container && PyErr_Occurred()) return failed;
      if (container && is_plain_dict(container) && !add_copy(containers_, container, name == of_buffers)) return failed;
    }
    return yes;
  }

  // The values of the dict under a name, as a new list; null, perhaps without an error, if there is no dict.
  static Owned values_under(const Owned& own, PyObject* name) {
    PyObject* values = PyDict_GetItemWithError(own.get(), name);
    return Owned(values && is_plain_dict(values) ? PyDict_Values(values) : nullptr);
  }

  // Appends a dict and a copy, without values that may hold a graph if the dict may have such. Tensors among the
  // attributes of `owner` count as buffers. False after an error.
  bool add_copy(const Owned& list, PyObject* dict, bool may_have_graphs, PyObject* owner = nullptr) {
    const Owned copy = PyDict_Size(dict) == 0 ? shared(nothing_.get()) : Owned(PyDict_Copy(dict));
    if (!copy || !append(list, dict) || !append(list, copy.get())) return false;
    bool is_whole = true;
    Py_ssize_t place = 0;
    PyObject *name, *value;
    while (may_have_graphs && PyDict_Next(copy.get(), &place, &name, &value)) {
      if (is_plain_type(Py_TYPE(value))) continue;
      const int is_of_torch = PySet_Contains(of_torch_, name);
      const Answer holds = is_of_torch < 0 ? failed : is_of_torch ? no : may_hold_graph(value);
      if (holds == failed) return false;
      if (holds == no) {
        if (owner && !is_of_torch && !append(buffers_, Owned(PyTuple_Pack(2, value, owner)).get())) return false;
        continue;
      }
      // Only the value of a present name changes, so the iteration may continue.
      if (PyDict_SetItem(copy.get(), name, not_held_) != 0) return false;
      is_whole = false;
    }
    return is_whole || append(partial_, dict);
  }

  // Whether a value is neither plain nor a tensor without a graph. A generator is added to the list.
  Answer may_hold_graph(PyObject* value) {
    const int is_tensor = is_tensor_type(Py_TYPE(value)) ? 1 : PyObject_IsInstance(value, tensor_);
    if (is_tensor == 1) {
      const Owned node(PyObject_GetAttrString(value, "grad_fn"));
      return node ? node.is(Py_None) ? no : yes : failed;
    }
    const int is_generator = is_tensor < 0 ? -1 : PyObject_IsInstance(value, generator_);
    return is_generator < 0 || (is_generator && !append(generators_, value)) ? failed : yes;
  }

  PyObject *container_names_, *of_torch_, *tensor_, *generator_, *not_held_;
  Owned modules_, parameters_, buffers_, generators_, attributes_, containers_, partial_;
  // The copy of every empty dict.
  Owned nothing_;
};

PyObject* held(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (count != 6 || !PyTuple_Check(objects[1]) || !PyAnySet_Check(objects[2]))
    return PyErr_Format(PyExc_TypeError, "expected (layer, containers, of_torch, tensor, generator, any)");
  Walk walk(objects);
  const Answer answer = walk.walk(objects[0]);
  if (answer == yes) return walk.found();
  if (answer == failed && no_if_exception() == failed) return nullptr;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"held", CKPT_FAST(held),
     "held(layer, containers, of_torch, tensor, generator, any): the modules, parameters, (buffer, module) also for "
     "tensors without a graph among the attributes, and generators of a layer, and for the state of the modules dicts "
     "with their copies: the attributes, those under the names `containers`, and the dicts whose copies have `any` for "
     "a value that may hold a graph, under a name "
     "not in `of_torch`. None where Python must decide."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_held(PyObject* module) {
  return prepare_names({{&of_buffers, "_buffers"}, {&of_modules, "_modules"}, {&of_parameters, "_parameters"}}) &&
         PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace ckpt
