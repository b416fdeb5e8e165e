// Whether torch's graph of gradients says at once that there is no recipe: the answer that most looks of Python's
// `recompute.provenance` end with.
#pragma once

#include "tensors.h"

namespace ckpt {

// Whether there is surely no recipe for what a node made, to which nobody has written since: a node on the way back, of
// which all operands would be needed, is none of the `rules`, and no block's. `name` is the first node's.
Answer has_surely_no_recipe(PyObject* node, PyObject* name, PyObject* rules);

// Nodes of these names pass what they need on to all their edges; at those of the others there may be a tensor; those
// of the type are Python's.
void read_graph_by(PyObject* passing, PyObject* stops, PyObject* python_node);

// False after an error.
bool prepare_graph();

}  // namespace ckpt
