#include "graph.h"

#include "owned.h"

namespace ckpt {

namespace {

// As provenance.MOST_STEPS, though it need not be: fewer only ask Python more often.
constexpr Py_ssize_t most_nodes = 12;

PyObject *of_name = nullptr, *of_next_functions = nullptr, *of_metadata = nullptr, *of_note = nullptr;
// As `read_graph_by` was given them.
PyObject *passing_names = nullptr, *stop_names = nullptr, *python_node_type = nullptr;

Answer is_in(PyObject* names, PyObject* name) {
  const int found = PySequence_Contains(names, name);
  return found < 0 ? failed : found ? yes : no;
}

// A queue of nodes on the way back from one, the nearest first.
class Way {
 public:
  // Takes the reference; false where there is no more place.
  bool add(Owned node) {
    if (count_ == most_nodes) return false;
    nodes_[count_++] = std::move(node);
    return true;
  }
  PyObject* next() { return at_ < count_ ? nodes_[at_++].get() : nullptr; }

 private:
  Owned nodes_[most_nodes];
  Py_ssize_t count_ = 0, at_ = 0;
};

// Whether the note on a node, if there is one, tells of an operand: no look behind that edge is needed.
bool is_noted(PyObject* note, Py_ssize_t place, Py_ssize_t edges) {
  return note && PyTuple_Check(note) && PyTuple_Size(note) == edges && PyTuple_GetItem(note, place) != Py_None;
}

// Adds the nodes at the edges of one; false after an error.
bool add_edges(PyObject* node, Way* way) {
  const Owned edges = attribute(node, of_next_functions), metadata = attribute(node, of_metadata);
  if (!edges || !PyTuple_Check(edges.get()) || !metadata || !PyDict_Check(metadata.get())) return false;
  PyObject* note = PyDict_GetItemWithError(metadata.get(), of_note);
  if (!note && PyErr_Occurred()) return false;
  for (Py_ssize_t i = PyTuple_Size(edges.get()); i-- > 0;) {
    if (is_noted(note, i, PyTuple_Size(edges.get()))) continue;
    PyObject* edge = PyTuple_GetItem(edges.get(), i);
    if (!PyTuple_Check(edge)) return false;
    // Without a node there is a number, or a tensor without a gradient, of which a note may tell.
    PyObject* next = PyTuple_GetItem(edge, 0);
    if (next != Py_None && !way->add(shared(next))) break;
  }
  return true;
}

}  // namespace

Answer has_surely_no_recipe(PyObject* first, PyObject* first_name, PyObject* rules) {
  if (!PyDict_CheckExact(rules)) return no;
  Way way;
  way.add(shared(first));
  while (PyObject* node = way.next()) {
    const Owned name = node == first ? shared(first_name) : called(node, of_name);
    if (!name) return failed;
    if (!PyDict_GetItemWithError(rules, name.get())) {
      if (PyErr_Occurred()) return failed;
      // Were the first a block's, the output would have been found by its memory.
      if (node == first) return yes;
      const Answer stops = is_in(stop_names, name.get());
      if (stops != no) {
        if (stops == failed) return failed;
        continue;
      }
      const int is_python = PyObject_IsInstance(node, python_node_type);
      if (is_python < 0) return failed;
      if (!is_python) return yes;
      continue;
    }
    const Answer passes = is_in(passing_names, name.get());
    if (passes == failed || (passes == yes && !add_edges(node, &way))) return failed;
  }
  return no;
}

void read_graph_by(PyObject* passing, PyObject* stops, PyObject* python_node) {
  Py_INCREF(passing);
  Py_INCREF(stops);
  Py_INCREF(python_node);
  passing_names = passing;
  stop_names = stops;
  python_node_type = python_node;
}

bool prepare_graph() {
  return prepare_names({{&of_name, "name"},
                        {&of_next_functions, "next_functions"},
                        {&of_metadata, "metadata"},
                        {&of_note, "ckpt_kernels"}});
}

}  // namespace ckpt
