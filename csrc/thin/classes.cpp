#include "classes.h"

namespace ckpt {

Classes classes;

namespace {

PyObject* set_up_classes(PyObject*, PyObject* arguments) {
  PyObject *announced, *block, *cell, *claim, *discarder, *entry, *kept, *recipe;
  if (!PyArg_ParseTuple(arguments, "OOOOOOOO", &announced, &block, &cell, &claim, &discarder, &entry, &kept, &recipe))
    return nullptr;
  const bool found = classes.announced.read(announced) && classes.block.read(block) && classes.cell.read(cell) &&
                     classes.claim.read(claim) && classes.discarder.read(discarder) && classes.entry.read(entry) &&
                     classes.kept.read(kept) && classes.recipe.read(recipe);
  if (!found) return nullptr;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"set_up_classes", set_up_classes, METH_VARARGS,
     "set_up_classes(announced, block, cell, claim, discarder, entry, kept, recipe): the classes of the "
     "objects that are created and read here."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_classes(PyObject* module) { return PyModule_AddFunctions(module, methods) == 0; }

}  // namespace ckpt
