// Decides quickly from the autograd graph that a tensor has no recipe, which is the outcome of most traces in Python's
// `recompute.provenance`.
#pragma once

#include "owned.h"

namespace ckpt {

// Whether there is certainly no recipe for the output of a node, because an operand that the recipe would need
//
// - is an output of a node in none of the `rules`, which is no block's of the discarder;
// - is needed for an output of a block that has no recipe;
// - is made by a node that keeps no output of its own, and nothing proves that nobody wrote to the operand;
// - has no node, or is a matrix among the parameters.
//
// `name` is the name of the given node. `is_written` says that the output has had in-place writes.
Answer has_surely_no_recipe(PyObject* node, PyObject* name, PyObject* rules, bool is_written, PyObject* discarder);

// The same for the result of a node that saves the result, which had no in-place writes.
Answer has_result_surely_no_recipe(PyObject* node, PyObject* name, PyObject* rules, PyObject* discarder);

// The name of a node, by the method of the node's class: the node of a function in Python is the `ctx` that a model may
// give an attribute `name`. Null, with an error, for null.
Owned name_of_node(const Owned& node);

// How nodes are read:
//
// - `saved` has, for the names of nodes with a rule, the attributes with the saved operands, and None for an operand
//   that the node does not save;
// - at nodes named in `stops` the output may be kept;
// - nodes named in `views` make views, and those in `writers` may write over their first operand;
// - the first operand of nodes named in `private_readers` is written to by nobody else;
// - nodes named in `gathers` may read a parameter of any size;
// - nodes of type `python_node` belong to functions in Python.
struct GraphNames {
  PyObject *saved, *stops, *views, *writers, *private_readers, *gathers, *python_node;
};

// Keeps the names as long as the process lives.
void read_graph_by(const GraphNames& names);

// Interns the names of attributes; false after an error.
bool prepare_graph();

}  // namespace ckpt
