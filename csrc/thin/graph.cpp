#include "graph.h"

#include "classes.h"

namespace ckpt {

namespace {

// Like provenance.MOST_STEPS, but need not be equal: with a smaller number Python is asked more often.
constexpr Py_ssize_t most_nodes = 12;

PyObject *of_name = nullptr, *of_next_functions = nullptr, *of_metadata = nullptr, *of_note = nullptr;
PyObject* of_recomputed_block = nullptr;
// The arguments of `read_graph_by`.
PyObject *passing_names = nullptr, *stop_names = nullptr, *python_node_type = nullptr;

Answer is_in(PyObject* names, PyObject* name) {
  const int found = PySequence_Contains(names, name);
  return found < 0 ? failed : found ? yes : no;
}

// A node, and the number of its output that the following node reads.
struct Edge {
  Owned node;
  long output = 0;
};

// A queue of the edges behind a node, the nearest first.
class Edges {
 public:
  // False if the queue is full.
  bool add(Edge edge) {
    if (count_ == most_nodes) return false;
    edges_[count_++] = std::move(edge);
    return true;
  }
  const Edge* next() { return at_ < count_ ? &edges_[at_++] : nullptr; }

 private:
  Edge edges_[most_nodes];
  Py_ssize_t count_ = 0, at_ = 0;
};

// Whether the note on a node has an entry for an operand, so that the edge need not be followed.
bool is_noted(PyObject* note, Py_ssize_t place, Py_ssize_t edges) {
  return note && PyTuple_Check(note) && PyTuple_Size(note) == edges && PyTuple_GetItem(note, place) != Py_None;
}

// Adds the nodes at the edges of a node; false after an error.
bool add_edges(PyObject* node, Edges* queue) {
  const Owned edges = attribute(node, of_next_functions), metadata = attribute(node, of_metadata);
  if (!edges || !PyTuple_Check(edges.get()) || !metadata || !PyDict_Check(metadata.get())) return false;
  PyObject* note = PyDict_GetItemWithError(metadata.get(), of_note);
  if (!note && PyErr_Occurred()) return false;
  for (Py_ssize_t i = PyTuple_Size(edges.get()); i-- > 0;) {
    if (is_noted(note, i, PyTuple_Size(edges.get()))) continue;
    PyObject* edge = PyTuple_GetItem(edges.get(), i);
    if (!PyTuple_Check(edge) || PyTuple_Size(edge) != 2) return false;
    // An edge without a node is a number, or a tensor without a gradient, which a note may cover.
    PyObject* next = PyTuple_GetItem(edge, 0);
    const long output = PyLong_AsLong(PyTuple_GetItem(edge, 1));
    if (output < 0) return false;
    if (next != Py_None && !queue->add({shared(next), output})) break;
  }
  return true;
}

// Whether the node of a function in Python is known to have no recipe for the output: a block's of this context has
// none but for the first output, and a node that `Recording::drop` marked has none for that.
Answer has_no_recipe_for(const Edge& edge, PyObject* discarder) {
  const Owned block = attribute(edge.node, of_recomputed_block);
  if (!block) return no_if_exception();
  if (edge.output == 0) return block.is(Py_None) ? yes : no;
  return classes.block.is_type_of(block.get()) && classes.block.owner.is(block.get(), discarder) ? yes : no;
}

// Whether a node that is in none of the rules makes a recipe impossible.
Answer is_without_recipe(const Edge& edge, PyObject* name, PyObject* discarder) {
  const Answer stops = is_in(stop_names, name);
  if (stops != no) return stops == yes ? no : failed;
  const int is_python = PyObject_IsInstance(edge.node.get(), python_node_type);
  if (is_python < 0) return failed;
  return is_python ? has_no_recipe_for(edge, discarder) : yes;
}

}  // namespace

Answer has_surely_no_recipe(PyObject* first, PyObject* first_name, PyObject* rules, PyObject* discarder) {
  if (!PyDict_CheckExact(rules)) return no;
  Edges queue;
  queue.add({shared(first)});
  while (const Edge* edge = queue.next()) {
    PyObject* node = edge->node.get();
    const Owned name = node == first ? shared(first_name) : called(node, of_name);
    if (!name) return failed;
    if (!PyDict_GetItemWithError(rules, name.get())) {
      if (PyErr_Occurred()) return failed;
      // If the first node were a block's, an entry would have been found for the output's storage.
      if (node == first) return yes;
      const Answer answer = is_without_recipe(*edge, name.get(), discarder);
      if (answer != no) return answer;
      continue;
    }
    const Answer passes = is_in(passing_names, name.get());
    if (passes == failed || (passes == yes && !add_edges(node, &queue))) return failed;
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
                        {&of_note, "ckpt_kernels"},
                        {&of_recomputed_block, "recomputed_block"}});
}

}  // namespace ckpt
