// The Python classes of `recompute` that C reads, with their slots.
#pragma once

#include "slots.h"

namespace ckpt {

struct AnnouncedClass : Slotted {
  Slot announcement, is_elementwise, saved, total;
  bool read(PyObject* of) {
    return find(
        of,
        {{&announcement, "announcement"}, {&is_elementwise, "is_elementwise"}, {&saved, "saved"}, {&total, "total"}});
  }
};

struct BlockClass : Slotted {
  Slot entry, owner, watch;
  bool read(PyObject* of) { return find(of, {{&entry, "entry"}, {&owner, "owner"}, {&watch, "watch"}}); }
};

struct CellClass : Slotted {
  Slot attached, content, is_clone, owner, version, watch;
  bool read(PyObject* of) {
    return find(of, {{&attached, "attached"},
                     {&content, "content"},
                     {&is_clone, "is_clone"},
                     {&owner, "owner"},
                     {&version, "version"},
                     {&watch, "watch"}});
  }
};

struct ClaimClass : Slotted {
  Slot depth, geometry, made, recipe, served;
  bool read(PyObject* of) {
    return find(
        of, {{&depth, "depth"}, {&geometry, "geometry"}, {&made, "made"}, {&recipe, "recipe"}, {&served, "served"}});
  }
};

struct DiscarderClass : Slotted {
  Slot all_entries, announced, boundaries, is_apart, is_closed, is_in_layer, is_paused, may_be_sharded, outer, rules,
      temporaries;
  bool read(PyObject* of) {
    return find(of, {{&all_entries, "all_entries"},
                     {&announced, "announced"},
                     {&boundaries, "boundaries"},
                     {&is_apart, "is_apart"},
                     {&is_closed, "is_closed"},
                     {&is_in_layer, "is_in_layer"},
                     {&is_paused, "is_paused"},
                     {&may_be_sharded, "may_be_sharded"},
                     {&outer, "outer"},
                     {&rules, "rules"},
                     {&temporaries, "temporaries"}});
  }
};

struct EntryClass : Slotted {
  Slot dtype, output, recipe, storage, version;
  bool read(PyObject* of) {
    return find(
        of,
        {{&dtype, "dtype"}, {&output, "output"}, {&recipe, "recipe"}, {&storage, "storage"}, {&version, "version"}});
  }
};

struct KeptClass : Slotted {
  Slot is_plain, tensor, version;
  bool read(PyObject* of) { return find(of, {{&is_plain, "is_plain"}, {&tensor, "tensor"}, {&version, "version"}}); }
};

struct RecipeClass : Slotted {
  Slot backend, claims, depth, layout, lock, made, operands, rebuild;
  bool read(PyObject* of) {
    return find(of, {{&backend, "backend"},
                     {&claims, "claims"},
                     {&depth, "depth"},
                     {&layout, "layout"},
                     {&lock, "lock"},
                     {&made, "made"},
                     {&operands, "operands"},
                     {&rebuild, "rebuild"}});
  }
};

struct Classes {
  AnnouncedClass announced;
  BlockClass block;
  CellClass cell;
  ClaimClass claim;
  DiscarderClass discarder;
  EntryClass entry;
  KeptClass kept;
  RecipeClass recipe;
};
extern Classes classes;

// Adds the function `set_up_classes` to `_thin`; false after an error.
bool add_classes(PyObject* module);

}  // namespace ckpt
