#include "cells.h"

#include "graph.h"
#include "owned.h"

namespace ckpt {

namespace {

// The Python classes of the objects created here; torch's layout of dense tensors; the length limit of chains of
// recipes.
PyTypeObject *cell_type = nullptr, *kept_type = nullptr, *claim_type = nullptr;
PyObject* strided = nullptr;
long longest_chain = 0;

PyObject *of_announced, *of_attached, *of_base, *of_cdata, *of_claims, *of_content, *of_depth, *of_detach, *of_discard,
    *of_dtype, *of_entries, *of_entry, *of_geometry, *of_grad_fn, *of_held, *of_is_apart, *of_is_clone, *of_is_closed,
    *of_is_leaf, *of_is_neg, *of_is_nested, *of_is_paused, *of_is_plain, *of_kept, *of_layout, *of_made,
    *of_may_be_sharded, *of_name, *of_outer, *of_output, *of_owner, *of_pack, *of_recipe, *of_recomputed_block,
    *of_rules, *of_saved, *of_served, *of_size, *of_storage_offset, *of_stride, *of_tensor, *of_total,
    *of_untyped_storage, *of_version, *of_tensor_version, *of_watch, *nothing_served;

// The value under a key of a dict; null, perhaps with an error, if there is none.
Owned held_under(const Owned& dict, const Owned& key) {
  return shared(dict && key && PyDict_CheckExact(dict.get()) ? PyDict_GetItemWithError(dict.get(), key.get())
                                                             : nullptr);
}

// A tensor that is packed for an autograd node, and the context that packs the tensor. Any method that returns no or
// null, perhaps with an error, leaves the case to Python.
class Packing {
 public:
  Packing(PyObject* discarder, PyObject* tensor) : discarder_(discarder), tensor_(tensor) {}

  Owned cell() {
    if (!is_usual()) return Owned();
    version_ = attribute(tensor_, of_tensor_version);
    const Owned base = attribute(tensor_, of_base);
    if (!version_ || !base) return Owned();
    PyObject* root = base.is(Py_None) ? tensor_ : base.get();
    const Owned is_leaf = attribute(root, of_is_leaf);
    // A leaf, or a view of one: no op made the tensor, so there is no recipe.
    if (is_leaf.is(Py_True)) return kept(Py_False);
    if (!is_leaf) return Owned();
    const Owned address = attribute(called(tensor_, of_untyped_storage), of_cdata);
    const Owned entry = address ? held_under(attribute(discarder_, of_entries), address) : Owned();
    if (PyErr_Occurred()) return Owned();
    // A view taken under no_grad has no recipe.
    if (entry && root != tensor_) {
      const Owned own_node = attribute(tensor_, of_grad_fn);
      if (!own_node || own_node.is(Py_None)) return Owned();
    }
    if (entry) return claimed(entry, base);
    const Owned node = attribute(root, of_grad_fn);
    const Owned name = called(node.get(), of_name);
    if (!name || !is_surely_kept(root, node, name)) return Owned();
    const bool is_clone = root == tensor_ && PyUnicode_CompareWithASCIIString(name.get(), "CloneBackward0") == 0;
    return kept(is_clone ? Py_True : Py_False);
  }

 private:
  bool has(PyObject* name, PyObject* value) const { return attribute(discarder_, name).is(value); }

  // Whether the tensor is dense and no subclass, there are no outer hooks, and no layer is open.
  bool is_usual() {
    if (!is_tensor_type(Py_TYPE(tensor_)) || !attribute(tensor_, of_layout).is(strided)) return false;
    if (!has(of_is_closed, Py_False) || !has(of_outer, Py_None)) return false;
    const Owned held = attribute(discarder_, of_held);
    if (!held || !PyDict_CheckExact(held.get()) || PyDict_Size(held.get()) != 0) return false;
    announced_ = attribute(discarder_, of_announced);
    return announced_ && (announced_.is(Py_None) || attribute(announced_, of_total).is(Py_None));
  }

  // Whether there is certainly no recipe, for a tensor or view that a node made and that has no entry.
  bool is_surely_kept(PyObject* root, const Owned& node, const Owned& name) const {
    const Owned is_paused = attribute(discarder_, of_is_paused);
    if (is_paused.is(Py_True)) return true;
    const Owned rules = is_paused ? attribute(discarder_, of_rules) : Owned();
    const Owned version = rules ? attribute(root, of_tensor_version) : Owned();
    if (!version) return false;
    // After an in-place write Python reads the graph in another way.
    const bool is_written = PyLong_AsLong(version.get()) != 0;
    if (is_written && PySequence_Contains(rules.get(), name.get()) != 0) return false;
    return has_surely_no_recipe(node.get(), name.get(), rules.get()) == yes;
  }

  Owned kept(PyObject* is_clone) const {
    const Owned tensor = called(tensor_, of_detach);
    if (!tensor) return Owned();
    const Owned kept =
        made(kept_type, {{of_tensor, tensor.get()}, {of_version, version_.get()}, {of_is_plain, Py_True}});
    Owned cell = cell_of(kept, tensor, is_clone);
    if (!cell || !note(cell)) return Owned();
    if (announces() && has(of_may_be_sharded, Py_False)) {
      const Owned all_kept = attribute(announced_, of_kept);
      if (!all_kept || PyObject_SetItem(all_kept.get(), identity().get(), kept.get()) != 0) return Owned();
    }
    return PyErr_Occurred() ? Owned() : std::move(cell);
  }

  // One more claim on the recipe in the entry of the tensor's storage.
  Owned claimed(const Owned& entry, const Owned& base) const {
    const Owned recipe = recipe_of(entry);
    const Owned depth = recipe ? attribute(recipe, of_depth) : Owned();
    if (!depth || PyLong_AsLong(depth.get()) > longest_chain || PyErr_Occurred()) return Owned();
    const Owned watch = watch_of(entry, base);
    // As in `_recipe_for`, a Parameter has no recipe. The version watch is a plain Tensor, so the type decides.
    if (!watch || Py_TYPE(watch.get()) != Py_TYPE(tensor_)) return Owned();
    const Owned claim = claim_of(recipe, depth);
    Owned cell = claim ? cell_of(claim, watch, Py_False) : Owned();
    return cell && note(cell) ? std::move(cell) : Owned();
  }

  // The recipe of an entry, if the entry is for this tensor or a base of it, without an in-place write since.
  Owned recipe_of(const Owned& entry) const {
    const bool is_plain = called(tensor_, of_is_neg).is(Py_False) && attribute(tensor_, of_is_nested).is(Py_False);
    const Owned dtype = is_plain ? attribute(tensor_, of_dtype) : Owned();
    if (!dtype || !attribute(entry, of_dtype).is(dtype.get())) return Owned();
    const Owned version = attribute(entry, of_version);
    if (!version || PyObject_RichCompareBool(version.get(), version_.get(), Py_EQ) != 1) return Owned();
    Owned recipe = called(attribute(entry, of_recipe));
    return recipe.is(Py_None) ? Owned() : std::move(recipe);
  }

  // The version watch of a block's output, also for a view of the output.
  Owned watch_of(const Owned& entry, const Owned& base) const {
    const Owned output = called(attribute(entry, of_output));
    if (!output || output.is(Py_None) || !(output.is(tensor_) || output.is(base.get()))) return Owned();
    const Owned block = attribute(attribute(output, of_grad_fn), of_recomputed_block);
    return block && attribute(block, of_entry).is(entry.get()) ? attribute(block, of_watch) : Owned();
  }

  Owned claim_of(const Owned& recipe, const Owned& depth) const {
    const Owned size = called(tensor_, of_size), stride = called(tensor_, of_stride);
    const Owned offset = called(tensor_, of_storage_offset), claims = attribute(recipe, of_claims);
    if (!size || !stride || !offset || !claims) return Owned();
    const Owned geometry(PyTuple_Pack(3, size.get(), stride.get(), offset.get()));
    if (!geometry) return Owned();
    Owned claim = made(claim_type, {{of_recipe, recipe.get()},
                                    {of_depth, depth.get()},
                                    {of_geometry, geometry.get()},
                                    {of_made, Py_None},
                                    {of_served, nothing_served}});
    const Owned discard = attribute(claims, of_discard);
    const Owned reference(claim && discard ? PyWeakref_NewRef(claim.get(), discard.get()) : nullptr);
    return reference && PySet_Add(claims.get(), reference.get()) == 0 ? std::move(claim) : Owned();
  }

  Owned cell_of(const Owned& content, const Owned& watch, PyObject* is_clone) const {
    if (!content) return Owned();
    return made(cell_type, {{of_content, content.get()},
                            {of_owner, discarder_},
                            {of_version, version_.get()},
                            {of_watch, watch.get()},
                            {of_is_clone, is_clone},
                            {of_attached, Py_None}});
  }

  // Whether an announced op must be told about the saved tensor.
  bool announces() const { return !announced_.is(Py_None) && has(of_is_apart, Py_False); }

  Owned identity() const { return Owned(PyLong_FromVoidPtr(tensor_)); }

  // Tells the announced op; false after an error.
  bool note(const Owned& cell) const {
    if (!announces()) return !PyErr_Occurred();
    const Owned key = identity(), packed(PyTuple_Pack(3, tensor_, cell.get(), Py_False));
    const Owned saved = attribute(announced_, of_saved);
    return key && packed && saved && PyObject_SetItem(saved.get(), key.get(), packed.get()) == 0;
  }

  PyObject *discarder_, *tensor_;
  Owned announced_, version_;
};

PyObject* pack(PyObject* discarder, PyObject* tensor) {
  Owned cell = Packing(discarder, tensor).cell();
  if (cell) return cell.release();
  // Python will raise an exception of this path again.
  if (PyErr_Occurred() && no_if_exception() == failed) return nullptr;
  return PyObject_CallMethodObjArgs(discarder, of_pack, tensor, nullptr);
}

PyMethodDef pack_definition = {"pack", pack, METH_O, "Discarder.pack, which is called in all but the usual cases."};

PyObject* packer(PyObject*, PyObject* discarder) { return PyCFunction_New(&pack_definition, discarder); }

PyObject* set_up_cells(PyObject*, PyObject* arguments) {
  PyObject *cell, *kept, *claim, *layout, *passing, *stops, *python_node;
  if (!PyArg_ParseTuple(arguments, "O!O!O!OlOOO", &PyType_Type, &cell, &PyType_Type, &kept, &PyType_Type, &claim,
                        &layout, &longest_chain, &passing, &stops, &python_node))
    return nullptr;
  for (PyObject* each : {cell, kept, claim, layout}) Py_INCREF(each);
  cell_type = reinterpret_cast<PyTypeObject*>(cell);
  kept_type = reinterpret_cast<PyTypeObject*>(kept);
  claim_type = reinterpret_cast<PyTypeObject*>(claim);
  strided = layout;
  read_graph_by(passing, stops, python_node);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"set_up_cells", set_up_cells, METH_VARARGS,
     "set_up_cells(cell, kept, claim, layout, longest_chain, passing, stops, python_node): the classes of the objects "
     "created here; the layout of dense tensors; the length limit of chains of recipes; the names of nodes that save "
     "no operand, and of nodes without a rule that may keep a tensor; the type of nodes of functions in Python."},
    {"packer", packer, METH_O, "packer(discarder): the discarder's hook `pack`."},
    {nullptr, nullptr, 0, nullptr},
};

bool prepare_cells() {
  nothing_served = PyLong_FromLong(-1);
  return nothing_served && prepare_names({{&of_announced, "announced"},
                                          {&of_attached, "attached"},
                                          {&of_base, "_base"},
                                          {&of_cdata, "_cdata"},
                                          {&of_claims, "claims"},
                                          {&of_content, "content"},
                                          {&of_depth, "depth"},
                                          {&of_detach, "detach"},
                                          {&of_discard, "discard"},
                                          {&of_dtype, "dtype"},
                                          {&of_entries, "entries"},
                                          {&of_entry, "entry"},
                                          {&of_geometry, "geometry"},
                                          {&of_grad_fn, "grad_fn"},
                                          {&of_held, "held"},
                                          {&of_is_apart, "is_apart"},
                                          {&of_is_clone, "is_clone"},
                                          {&of_is_closed, "is_closed"},
                                          {&of_is_leaf, "is_leaf"},
                                          {&of_is_neg, "is_neg"},
                                          {&of_is_nested, "is_nested"},
                                          {&of_is_paused, "is_paused"},
                                          {&of_is_plain, "is_plain"},
                                          {&of_kept, "kept"},
                                          {&of_layout, "layout"},
                                          {&of_made, "made"},
                                          {&of_may_be_sharded, "may_be_sharded"},
                                          {&of_name, "name"},
                                          {&of_outer, "outer"},
                                          {&of_output, "output"},
                                          {&of_owner, "owner"},
                                          {&of_pack, "pack"},
                                          {&of_recipe, "recipe"},
                                          {&of_recomputed_block, "recomputed_block"},
                                          {&of_rules, "rules"},
                                          {&of_saved, "saved"},
                                          {&of_served, "served"},
                                          {&of_size, "size"},
                                          {&of_storage_offset, "storage_offset"},
                                          {&of_stride, "stride"},
                                          {&of_tensor, "tensor"},
                                          {&of_tensor_version, "_version"},
                                          {&of_total, "total"},
                                          {&of_untyped_storage, "untyped_storage"},
                                          {&of_version, "version"},
                                          {&of_watch, "watch"}});
}

}  // namespace

bool add_cells(PyObject* module) {
  return prepare_graph() && prepare_cells() && PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace ckpt
