#include "graph.h"

#include "classes.h"
#include "members.h"

namespace ckpt {

namespace {

// Like provenance.MOST_STEPS, but need not be equal: with a smaller number Python is asked more often.
constexpr Py_ssize_t most_nodes = 24;

PyObject *of_name = nullptr, *of_next_functions = nullptr, *of_metadata = nullptr, *of_note = nullptr;
PyObject *of_recomputed_block = nullptr, *of_watched = nullptr, *of_data = nullptr, *of_variable = nullptr;
PyObject *of_type_name = nullptr, *names_by_type = nullptr;
GraphNames names;

Answer is_in(PyObject* holder, PyObject* name) {
  const int found = PySequence_Contains(holder, name);
  return found < 0 ? failed : found ? yes : no;
}

// A node with its name; the number of its output that the following node reads; and whether an in-place write to this
// output is ruled out.
struct Edge {
  Owned node, name;
  long output = 0;
  bool is_unwritten = false;
};

// The edge at a place of a node's `next_functions`. Without a node there is no name; without either, an error.
Edge edge_at(PyObject* edges, Py_ssize_t place) {
  Edge edge;
  PyObject* pair = PyTuple_GetItem(edges, place);
  if (!pair || !PyTuple_Check(pair) || PyTuple_Size(pair) != 2) return edge;
  edge.node = shared(PyTuple_GetItem(pair, 0));
  edge.output = PyLong_AsLong(PyTuple_GetItem(pair, 1));
  if (!edge.node.is(Py_None)) edge.name = name_of_node(edge.node);
  return edge;
}

// Finds the note on a node, if there is one; false after an error.
bool find_note(PyObject* node, Owned* note) {
  const Owned metadata = attribute(node, of_metadata);
  if (!metadata || !PyDict_Check(metadata.get())) return false;
  *note = shared(PyDict_GetItemWithError(metadata.get(), of_note));
  return *note || !PyErr_Occurred();
}

// Whether the note on a node has an entry for an operand, so that the edge need not be followed.
bool is_noted(PyObject* note, Py_ssize_t place, Py_ssize_t edges) {
  return note && PyTuple_Check(note) && PyTuple_Size(note) == edges && PyTuple_GetItem(note, place) != Py_None;
}

// Whether a node may hold an operand in the attribute of this name: `no` if it certainly does not.
Answer may_save(PyObject* node, PyObject* name) {
  if (name == Py_None) return no;
  const Owned saved(PyObject_GetAttr(node, name)), data(saved ? PyObject_GetAttr(saved.get(), of_data) : nullptr);
  return data ? data.is(Py_None) ? no : yes : no_if_exception() == failed ? failed : yes;
}

Answer is_of_python(PyObject* node) {
  const int found = PyObject_IsInstance(node, names.python_node);
  return found < 0 ? failed : found ? yes : no;
}

// Whether all nodes of a type have this name: the type is one of torch's in C++, which are never freed, and torch named
// it for one kind of node.
bool may_be_known(PyObject* type, const Owned& name) {
  if (PyType_GetFlags(reinterpret_cast<PyTypeObject*>(type)) & Py_TPFLAGS_HEAPTYPE) return false;
  const Owned own_name = attribute(type, of_type_name);
  return own_name && are_equal(own_name.get(), name.get());
}

class Search {
 public:
  Search(PyObject* rules, PyObject* discarder) : rules_(rules), discarder_(discarder) {}

  // Whether the output of this node has certainly no recipe.
  Answer of(Edge first) {
    Answer answer = is_without_rule(first.name.get());
    if (answer != no) return answer;
    count_ = 1;
    queue_[0] = std::move(first);
    for (Py_ssize_t at = 0; at < count_ && answer == no; ++at) answer = visit(queue_[at]);
    return answer;
  }

  // The same for a node that saves its result: the recipe may not read the result itself.
  Answer of_result(Edge first) {
    Answer answer = is_without_rule(first.name.get());
    const Owned nothing_saved(answer == no ? PyTuple_New(0) : nullptr);
    if (!nothing_saved) return answer == no ? failed : answer;
    answer = visit_edges(first, nothing_saved.get());
    for (Py_ssize_t at = 0; at < count_ && answer == no; ++at) answer = visit(queue_[at]);
    return answer;
  }

  // Whether such nodes, from this one on, certainly did not make all writes to a block's output.
  Answer is_written_by_others(const Owned& node, PyObject* name) const {
    // A node that saves an operand may save a clone that it wrote over.
    PyObject* saved = PyDict_GetItemWithError(names.saved, name);
    if (!saved) return PyErr_Occurred() ? failed : no;
    for (Py_ssize_t i = 0; i < PyTuple_Size(saved); ++i)
      if (PyTuple_GetItem(saved, i) != Py_None) return no;
    Owned block;
    const Answer leads = leads_to_block(node, name, &block);
    return leads == failed ? failed : leads == yes ? no : yes;
  }

 private:
  Answer is_without_rule(PyObject* name) const {
    if (PyDict_GetItemWithError(rules_, name)) return no;
    return PyErr_Occurred() ? failed : yes;
  }

  // Whether a node makes a recipe impossible; else adds the nodes at those of its edges that a recipe needs.
  Answer visit(const Edge& edge) {
    Answer answer = is_without_rule(edge.name.get());
    if (answer != no) return answer == yes ? is_without_recipe(edge) : failed;
    PyObject* saved = PyDict_GetItemWithError(names.saved, edge.name.get());
    return saved ? visit_edges(edge, saved) : PyErr_Occurred() ? failed : no;
  }

  // Whether a node that is in none of the rules makes a recipe impossible.
  Answer is_without_recipe(const Edge& edge) const {
    const Answer stops = is_in(names.stops, edge.name.get());
    if (stops != no) return stops == yes ? no : failed;
    const Answer is_python = is_of_python(edge.node.get());
    return is_python == yes ? has_no_recipe_for(edge) : is_python == failed ? failed : yes;
  }

  // Whether the node of a function in Python is known to have no recipe for the output: a block's of this context has
  // none but for the first output, and a node that `Recording::drop` marked has none for that.
  Answer has_no_recipe_for(const Edge& edge) const {
    const Owned block = attribute(edge.node, of_recomputed_block);
    if (!block) return no_if_exception();
    if (edge.output == 0) return block.is(Py_None) ? yes : no;
    return is_own(block) ? yes : no;
  }

  bool is_own(const Owned& block) const {
    return classes.block.is_type_of(block.get()) && classes.block.owner.is(block.get(), discarder_);
  }

  Answer visit_edges(const Edge& edge, PyObject* saved) {
    PyObject *node = edge.node.get(), *name = edge.name.get();
    const Owned edges = attribute(node, of_next_functions);
    if (!edges || !PyTuple_Check(edges.get())) return failed;
    const Py_ssize_t count = PyTuple_Size(edges.get()), saved_count = PyTuple_Size(saved);
    if (saved_count != 0 && saved_count != count) return no;
    const Answer is_view = is_in(names.views, name), is_private = is_in(names.private_readers, name);
    if (is_view == failed || is_private == failed) return failed;
    Owned note;
    // No view has a note, and to ask a node for metadata creates them.
    if (is_view == no && !find_note(node, &note)) return failed;
    const bool is_any_noted = note && PyTuple_Check(note.get()) && PyTuple_Size(note.get()) != 0;
    const bool are_unwritten = is_any_noted || is_private == yes || (edge.is_unwritten && is_view == yes);
    for (Py_ssize_t i = count; i-- > 0;) {
      if (is_noted(note.get(), i, count)) continue;
      const Answer may_hold = saved_count ? may_save(node, PyTuple_GetItem(saved, i)) : no;
      if (may_hold == failed) return failed;
      if (may_hold == yes) continue;
      Edge next = edge_at(edges.get(), i);
      if (next.node.is(Py_None)) return yes;
      if (!next.name || PyErr_Occurred()) return failed;
      next.is_unwritten = are_unwritten;
      const Answer answer = is_out_of_reach(next, name);
      if (answer != no) return answer;
      if (count_ < most_nodes) queue_[count_++] = std::move(next);
    }
    return no;
  }

  // Whether the operand at an edge of the node named `reader` is certainly out of a trace's reach.
  Answer is_out_of_reach(const Edge& edge, PyObject* reader) const {
    const Answer stops = is_in(names.stops, edge.name.get());
    if (stops == failed) return failed;
    if (stops == yes) return is_matrix(edge, reader);
    const Answer is_view = is_in(names.views, edge.name.get()), is_foreign = is_without_rule(edge.name.get());
    if (is_view == failed || is_foreign == failed) return failed;
    if (edge.is_unwritten || is_view == yes || is_foreign == yes) return no;
    if (!classes.discarder.temporaries.is(discarder_, Py_False)) return no;
    const Answer is_watched = is_watched_output(edge);
    if (is_watched != no) return is_watched == yes ? no : failed;
    return is_not_last_writer(edge);
  }

  Answer is_watched_output(const Edge& edge) const {
    const Owned metadata = attribute(edge.node, of_metadata);
    return metadata ? is_in(metadata.get(), of_watched) : failed;
  }

  // Whether the edge is that of a leaf with several dimensions, which only a gather reads again.
  Answer is_matrix(const Edge& edge, PyObject* reader) const {
    if (PyUnicode_CompareWithASCIIString(edge.name.get(), "torch::autograd::AccumulateGrad") != 0) return no;
    const Owned variable = attribute(edge.node, of_variable);
    DLTensor described;
    const Answer is_plain = variable ? describe(variable.get(), &described) : failed;
    if (is_plain != yes || described.dim < 2) return is_plain == failed ? failed : no;
    const Answer gathers = is_in(names.gathers, reader);
    return gathers == failed ? failed : gathers == yes ? no : yes;
  }

  // Whether the output of a node is certainly no block's output that this node has written to last.
  Answer is_not_last_writer(const Edge& edge) const {
    Owned block;
    const Answer leads = edge.output == 0 ? leads_to_block(edge.node, edge.name.get(), &block) : no;
    if (leads != yes) return leads == failed ? failed : yes;
    if (!block) return no;
    const Owned output(PyObject_CallNoArgs(classes.entry.output.of(classes.block.entry.of(block.get()))));
    if (!output) return failed;
    if (output.is(Py_None)) return yes;
    const Owned node = is_tensor_type(Py_TYPE(output.get())) ? tensor_members.grad_fn.of(output) : Owned();
    return node ? node.is(edge.node.get()) ? no : yes : PyErr_Occurred() ? failed : no;
  }

  // Whether a node and the nodes before it, by their first edges, may all have written over a block's output or a
  // watched one: `no` if certainly not. `block` stays null where this is unknown, or the output is watched.
  Answer leads_to_block(const Owned& first, PyObject* first_name, Owned* block) const {
    Edge edge;
    edge.node = shared(first.get());
    edge.name = shared(first_name);
    for (Py_ssize_t i = 0; i < most_nodes; ++i) {
      if (edge.node.is(Py_None)) return no;
      if (!edge.name || PyErr_Occurred()) return failed;
      if (i > 0) {
        const Answer is_watched = is_watched_output(edge);
        if (is_watched != no) return is_watched;
      }
      const Answer writes = is_in(names.writers, edge.name.get());
      if (writes == failed) return failed;
      if (writes == no) return is_block(edge, block);
      if (edge.output != 0) return no;
      const Owned edges = attribute(edge.node, of_next_functions);
      if (!edges || !PyTuple_Check(edges.get()) || PyTuple_Size(edges.get()) == 0) return failed;
      edge = edge_at(edges.get(), 0);
    }
    return yes;
  }

  Answer is_block(const Edge& edge, Owned* block) const {
    const Answer is_python = is_of_python(edge.node.get());
    if (is_python != yes || edge.output != 0) return is_python == failed ? failed : no;
    *block = attribute(edge.node, of_recomputed_block);
    if (!*block) return no_if_exception();
    return is_own(*block) ? yes : no;
  }

  PyObject *rules_, *discarder_;
  Edge queue_[most_nodes];
  Py_ssize_t count_ = 0;
};

}  // namespace

Answer has_surely_no_recipe(PyObject* node, PyObject* name, PyObject* rules, bool is_written, PyObject* discarder) {
  if (!PyDict_CheckExact(rules)) return no;
  Search search(rules, discarder);
  Edge first;
  first.node = shared(node);
  first.name = shared(name);
  if (!is_written) return search.of(std::move(first));
  if (PyDict_GetItemWithError(rules, name)) return search.is_written_by_others(first.node, name);
  return PyErr_Occurred() ? failed : yes;
}

Answer has_result_surely_no_recipe(PyObject* node, PyObject* name, PyObject* rules, PyObject* discarder) {
  if (!PyDict_CheckExact(rules)) return no;
  Search search(rules, discarder);
  Edge first;
  first.node = shared(node);
  first.name = shared(name);
  return search.of_result(std::move(first));
}

Owned name_of_node(const Owned& node) {
  PyObject* type = node ? reinterpret_cast<PyObject*>(Py_TYPE(node.get())) : nullptr;
  Owned known = shared(type ? PyDict_GetItemWithError(names_by_type, type) : nullptr);
  if (known || PyErr_Occurred()) return known;
  const Owned method = attribute(type, of_name);
  Owned name(method ? PyObject_CallFunctionObjArgs(method.get(), node.get(), nullptr) : nullptr);
  return name && may_be_known(type, name) && PyDict_SetItem(names_by_type, type, name.get()) != 0 ? Owned()
                                                                                                  : std::move(name);
}

void read_graph_by(const GraphNames& given) {
  names = given;
  for (PyObject* each :
       {names.saved, names.stops, names.views, names.writers, names.private_readers, names.gathers, names.python_node})
    Py_INCREF(each);
}

bool prepare_graph() {
  names_by_type = PyDict_New();
  return names_by_type && prepare_names({{&of_name, "name"},
                                         {&of_next_functions, "next_functions"},
                                         {&of_metadata, "metadata"},
                                         {&of_note, "ckpt_kernels"},
                                         {&of_watched, "ckpt_kernels watched"},
                                         {&of_data, "data"},
                                         {&of_variable, "variable"},
                                         {&of_type_name, "__name__"},
                                         {&of_recomputed_block, "recomputed_block"}});
}

}  // namespace ckpt
