#include "cells.h"

#include "classes.h"
#include "graph.h"
#include "members.h"
#include "watches.h"

namespace ckpt {

namespace {

// Torch's layout of dense tensors; a dtype of torch; the length limit of chains of recipes.
PyObject *strided = nullptr, *float32 = nullptr;
long longest_chain = 0;

PyObject *of_cdata, *of_discard, *of_pack, *of_recomputed_block, *nothing_served;

// The value under a key of a dict; null, perhaps with an error, if there is none.
Owned held_under(PyObject* dict, const Owned& key) {
  return shared(key && PyDict_Check(dict) ? PyDict_GetItemWithError(dict, key.get()) : nullptr);
}

// A tensor that is packed for an autograd node, and the context that packs the tensor. Any method that returns no or
// null, perhaps with an error, leaves the case to Python.
class Packing {
 public:
  Packing(PyObject* discarder, PyObject* tensor) : discarder_(discarder), tensor_(tensor) {}

  Owned cell() {
    const Fate fate = decide();
    if (fate == unclear) return Owned();
    version_ = tensor_members.version.of(tensor_);
    if (!version_) return Owned();
    return fate == kept ? kept_cell() : claimed_cell();
  }

  bool is_surely_kept() { return decide() == kept; }

 private:
  // What becomes of the tensor; `unclear` perhaps with an error.
  enum Fate { kept, claimed, unclear };

  Fate decide() {
    if (!is_usual()) return unclear;
    base_ = tensor_members.base.of(tensor_);
    if (!base_) return unclear;
    PyObject* root = base_.is(Py_None) ? tensor_ : base_.get();
    if (!is_tensor_type(Py_TYPE(root))) return unclear;
    const Owned is_leaf = tensor_members.is_leaf.of(root);
    // A leaf, or a view of one: no op made the tensor, so there is no recipe.
    if (is_leaf.is(Py_True)) return kept;
    if (!is_leaf) return unclear;
    entry_ = found_entry();
    if (PyErr_Occurred()) return unclear;
    // A view taken under no_grad has no recipe.
    if (entry_ && root != tensor_) {
      const Owned own_node = tensor_members.grad_fn.of(tensor_);
      if (!own_node || own_node.is(Py_None)) return unclear;
    }
    if (entry_) return claimed;
    const Owned node = tensor_members.grad_fn.of(root);
    const Owned name = name_of_node(node);
    if (!name || !has_no_recipe(root, node, name)) return unclear;
    is_clone_ = root == tensor_ && PyUnicode_CompareWithASCIIString(name.get(), "CloneBackward0") == 0;
    return kept;
  }

  // Whether the tensor is dense and no subclass, there are no outer hooks, and no layer is open.
  bool is_usual() {
    if (!is_tensor_type(Py_TYPE(tensor_)) || !tensor_members.layout.of(tensor_).is(strided)) return false;
    if (!slots_.is_closed.is(discarder_, Py_False) || !slots_.outer.is(discarder_, Py_None)) return false;
    PyObject* boundaries = slots_.boundaries.of(discarder_);
    if (!boundaries || !PyDict_Check(boundaries) || PyDict_Size(boundaries) != 0) return false;
    announced_ = shared(slots_.announced.of(discarder_));
    return announced_ && (announced_.is(Py_None) || classes.announced.total.is(announced_.get(), Py_None));
  }

  // The entry for the tensor's storage; null, perhaps with an error, if there is none.
  Owned found_entry() const {
    const Owned entries = shared(slots_.all_entries.of(discarder_));
    if (PyDict_Size(entries.get()) == 0) return Owned();
    return held_under(entries.get(), attribute(tensor_members.untyped_storage.of(tensor_), of_cdata));
  }

  // Whether there is certainly no recipe, for a tensor or view that a node made and that has no entry.
  bool has_no_recipe(PyObject* root, const Owned& node, const Owned& name) const {
    // Python keeps a copy in float32 of a 16-bit tensor in 16 bits.
    const bool is_cast = PyUnicode_CompareWithASCIIString(name.get(), "ToCopyBackward0") == 0;
    if (is_cast && tensor_members.dtype.of(root).is(float32)) return false;
    if (slots_.is_paused.is(discarder_, Py_True)) return true;
    const Owned rules = shared(slots_.rules.of(discarder_)), version = tensor_members.version.of(root);
    if (!version) return false;
    const bool is_written = PyLong_AsLong(version.get()) != 0;
    return has_surely_no_recipe(node.get(), name.get(), rules.get(), is_written, discarder_) == yes;
  }

  Owned kept_cell() const {
    const Owned tensor = tensor_members.detach.of(tensor_);
    const Owned kept = tensor ? classes.kept.object() : Owned();
    if (!kept) return Owned();
    classes.kept.tensor.set(kept.get(), tensor.get());
    classes.kept.version.set(kept.get(), version_.get());
    classes.kept.is_plain.set(kept.get(), Py_True);
    return noted(cell_of(kept, tensor, is_clone_ ? Py_True : Py_False));
  }

  // One more claim on the recipe in the entry of the tensor's storage.
  Owned claimed_cell() const {
    const Owned recipe = entry_recipe();
    if (!recipe || !classes.recipe.is_type_of(recipe.get())) return Owned();
    const Owned depth = shared(classes.recipe.depth.of(recipe.get()));
    if (PyLong_AsLong(depth.get()) > longest_chain || PyErr_Occurred()) return Owned();
    const Owned watch = entry_watch();
    // As in `_recipe_for`, a Parameter has no recipe. The version watch is a plain Tensor, so the type decides.
    if (!watch || Py_TYPE(watch.get()) != Py_TYPE(tensor_)) return Owned();
    return noted(cell_of(claim_of(recipe, depth), watch, Py_False));
  }

  // The recipe of an entry, if the entry is for this tensor or a base of it, without an in-place write since.
  Owned entry_recipe() const {
    const bool is_plain =
        tensor_members.is_neg.of(tensor_).is(Py_False) && tensor_members.is_nested.of(tensor_).is(Py_False);
    const Owned dtype = is_plain ? tensor_members.dtype.of(tensor_) : Owned();
    if (!dtype || !classes.entry.dtype.is(entry_.get(), dtype.get())) return Owned();
    if (!are_equal(classes.entry.version.of(entry_.get()), version_.get())) return Owned();
    Owned recipe(PyObject_CallNoArgs(classes.entry.recipe.of(entry_.get())));
    return recipe.is(Py_None) ? Owned() : std::move(recipe);
  }

  // The version watch of a block's output, also for a view of the output; else a new one.
  Owned entry_watch() const {
    const Owned output(PyObject_CallNoArgs(classes.entry.output.of(entry_.get())));
    if (!output) return Owned();
    if (output.is(tensor_) || output.is(base_.get())) {
      const Owned block = attribute(tensor_members.grad_fn.of(output), of_recomputed_block);
      if (!block) return Owned();
      const bool is_block = classes.block.is_type_of(block.get());
      if (is_block && classes.block.entry.is(block.get(), entry_.get()))
        return shared(classes.block.watch.of(block.get()));
    }
    return version_watch(tensor_);
  }

  Owned claim_of(const Owned& recipe, const Owned& depth) const {
    const Owned size = tensor_members.size.of(tensor_), stride = tensor_members.stride.of(tensor_);
    const Owned offset = tensor_members.storage_offset.of(tensor_),
                claims = shared(classes.recipe.claims.of(recipe.get()));
    if (!size || !stride || !offset) return Owned();
    const Owned geometry(PyTuple_Pack(3, size.get(), stride.get(), offset.get()));
    Owned claim = geometry ? classes.claim.object() : Owned();
    if (!claim) return Owned();
    classes.claim.recipe.set(claim.get(), recipe.get());
    classes.claim.depth.set(claim.get(), depth.get());
    classes.claim.geometry.set(claim.get(), geometry.get());
    classes.claim.made.set(claim.get(), Py_None);
    classes.claim.served.set(claim.get(), nothing_served);
    const Owned discard = attribute(claims, of_discard);
    const Owned reference(discard ? PyWeakref_NewRef(claim.get(), discard.get()) : nullptr);
    return reference && PySet_Add(claims.get(), reference.get()) == 0 ? std::move(claim) : Owned();
  }

  Owned cell_of(const Owned& content, const Owned& watch, PyObject* is_clone) const {
    Owned cell = content ? classes.cell.object() : Owned();
    if (!cell) return Owned();
    classes.cell.content.set(cell.get(), content.get());
    classes.cell.owner.set(cell.get(), discarder_);
    classes.cell.version.set(cell.get(), version_.get());
    classes.cell.watch.set(cell.get(), watch.get());
    classes.cell.is_clone.set(cell.get(), is_clone);
    classes.cell.attached.set(cell.get(), Py_None);
    return cell;
  }

  // The cell, after the announced op has been told about the saved tensor; null after an error.
  Owned noted(Owned cell) const {
    if (!cell || announced_.is(Py_None) || !slots_.is_apart.is(discarder_, Py_False)) return cell;
    const Owned key(PyLong_FromVoidPtr(tensor_)), packed(PyTuple_Pack(3, tensor_, cell.get(), Py_False));
    const Owned saved = shared(classes.announced.saved.of(announced_.get()));
    return key && packed && PyObject_SetItem(saved.get(), key.get(), packed.get()) == 0 ? std::move(cell) : Owned();
  }

  const DiscarderClass& slots_ = classes.discarder;
  PyObject *discarder_, *tensor_;
  Owned announced_, base_, entry_, version_;
  bool is_clone_ = false;
};

PyObject* pack(PyObject* discarder, PyObject* tensor) {
  Owned cell = Packing(discarder, tensor).cell();
  if (cell) return cell.release();
  // Python will raise an exception of this path again.
  if (PyErr_Occurred() && no_if_exception() == failed) return nullptr;
  return PyObject_CallMethodObjArgs(discarder, of_pack, tensor, nullptr);
}

PyMethodDef pack_definition = {"pack", pack, METH_O, "Discarder.pack, which is called in all but the usual cases."};

PyObject* packer(PyObject*, PyObject* discarder) {
  const bool is_one = classes.discarder.is_type_of(discarder);
  PyObject* entries = is_one ? classes.discarder.all_entries.of(discarder) : nullptr;
  if (!entries || !PyDict_Check(entries)) return PyErr_Format(PyExc_TypeError, "expected a Discarder with its entries");
  return PyCFunction_New(&pack_definition, discarder);
}

PyObject* keeps_result(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (count != 4 || !classes.discarder.is_type_of(objects[0]))
    return PyErr_Format(PyExc_TypeError, "expected (discarder, node, name, rules)");
  const Answer answer = has_result_surely_no_recipe(objects[1], objects[2], objects[3], objects[0]);
  if (answer == failed && no_if_exception() == failed) return nullptr;
  return PyBool_FromLong(answer == yes);
}

PyObject* set_up_cells(PyObject*, PyObject* arguments) {
  GraphNames names;
  if (!PyArg_ParseTuple(arguments, "OOlO!OOOOOO", &strided, &float32, &longest_chain, &PyDict_Type, &names.saved,
                        &names.stops, &names.views, &names.writers, &names.private_readers, &names.gathers,
                        &names.python_node))
    return nullptr;
  Py_INCREF(strided);
  Py_INCREF(float32);
  read_graph_by(names);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"set_up_cells", set_up_cells, METH_VARARGS,
     "set_up_cells(layout, float32, longest_chain, saved, stops, views, writers, private_readers, gathers, "
     "python_node): the layout of dense tensors; a dtype; the length limit of chains of recipes; the names in "
     "graph.h."},
    {"keeps_result", CKPT_FAST(keeps_result),
     "keeps_result(discarder, node, name, rules): whether there is certainly no recipe for the result, never written "
     "to, of a node that saves the result."},
    {"packer", packer, METH_O, "packer(discarder): the discarder's hook `pack`."},
    {nullptr, nullptr, 0, nullptr},
};

bool prepare_cells() {
  nothing_served = PyLong_FromLong(-1);
  return nothing_served && prepare_names({{&of_cdata, "_cdata"},
                                          {&of_discard, "discard"},
                                          {&of_pack, "pack"},
                                          {&of_recomputed_block, "recomputed_block"}});
}

}  // namespace

bool is_surely_kept(PyObject* discarder, PyObject* tensor) { return Packing(discarder, tensor).is_surely_kept(); }

bool add_cells(PyObject* module) {
  return prepare_graph() && prepare_cells() && PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace ckpt
