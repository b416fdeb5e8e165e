// Decides quickly from the autograd graph that a tensor has no recipe, which is the outcome of most traces in Python's
// `recompute.provenance`.
#pragma once

#include "tensors.h"

namespace ckpt {

// Whether there is certainly no recipe for the unwritten output of a node: a node behind it, of which all operands
// would be needed, is in none of the `rules`, and is no block's of the discarder, or is needed for an output of a block
// that has no recipe. `name` is the name of the given node.
Answer has_surely_no_recipe(PyObject* node, PyObject* name, PyObject* rules, PyObject* discarder);

// Nodes named in `passing` save no operand, so all their edges are needed. At nodes named in `stops` a tensor may be
// kept. Nodes of type `python_node` belong to functions in Python.
void read_graph_by(PyObject* passing, PyObject* stops, PyObject* python_node);

// Interns the names; false after an error.
bool prepare_graph();

}  // namespace ckpt
