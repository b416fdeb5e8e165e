"""The analysis that finds the names that a function writes to in place."""

import operator
import types
from operator import iadd as plus

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, relu_

from ckpt_kernels.convert.code.scope import Scope
from ckpt_kernels.convert.code.source import definition_of
from ckpt_kernels.convert.code.written_names import written_names


def writes_to_a_view(self, x):
    v = x.view(-1)
    v.add_(1)
    return x


def writes_after_a_call(self, x):
    h = torch.zeros_like(x)
    y = self.norm(h)
    h.add_(1)
    return y


def writes_to_an_item(self, x):
    x[0] = 0
    return x


def writes_by_iadd_as_a_method(self, x):
    x.__iadd__(1)
    return x


def writes_by_operator_iadd(self, x):
    operator.iadd(x, 1)
    return x


def writes_by_a_flag(self, x):
    return F.relu(x, True)


def writes_by_out(self, x):
    return torch.add(x, 1, out=x)


def writes_before_a_reassignment(self, x):
    h = x
    h.add_(1)
    h = h.clone()
    return h


def writes_to_a_loop_variable(self, x):
    h = torch.zeros(1)
    for h in x.unbind(0):
        h.add_(1)
    return h


def writes_to_a_copy_or_the_input(self, x):
    h = x.clone() if self.training else x
    h.add_(1)
    return h


def keeps_input_and_calls_getattr(self, x):
    flags = [getattr(self, "flag", True), True]
    return x * flags.index(True) * torch.tensor(True)


def keeps_input_and_sets_dict_items(self, x):
    tables = {}
    for key in ("a", "b"):
        tables[key] = self.get_parameter(key)
    return self.compute(x, tables)


def writes_to_an_item_of_an_unknown_object(self, x):
    tables = {}
    tables = self.find(x)
    tables[x.shape[0]] = 0
    return tables


def writes_by_a_flag_and_a_long_name(self, x):
    return torch.nn.functional.relu(x, True)


def writes_to_a_list_element(self, x):
    held = [x]
    held[0] += 1
    return x


def writes_to_a_dict_value(self, x):
    held = {"x": x}
    held["x"].mul_(2)
    return x


def writes_to_an_element_of_a_repeated_list(self, x):
    held = [x] * 2
    held[1].add_(1)
    return x


def writes_to_two_targets(self, x):
    x[..., 0], x[..., 1] = 0.0, 1.0
    return x


def writes_to_an_annotated_target(self, x):
    x[..., 0]: Tensor = 0.0
    return x


def writes_to_a_loop_target(self, x):
    for x[:, 0] in (0.0,):
        pass
    return x


def writes_to_a_view_by_einsum(self, x):
    y = torch.einsum("bd->db", x)
    y[0] = 0.0
    return x


def writes_by_a_bound_method(self, x):
    add = x.add_
    add(1)
    return x


def writes_by_a_method(self, x):
    x.add_(1)
    return x


def writes_by_getattr_with_a_computed_name(self, x):
    getattr(x, "add" + "_")(1)
    return x


def writes_to_a_maximum(self, x):
    y = max(x, 0)
    y += 1
    return x


def writes_by_an_alias_of_a_function(self, x):
    plus(x, 1)
    return x


def writes_by_a_torch_function(self, x):
    return relu_(x)


def writes_by_an_unknown_flag(self, x):
    return F.relu(x, self.flag)


def writes_by_unknown_flags(self, x):
    return F.relu(x, **self.flags)


def writes_by_setitem_as_a_method(self, x):
    x.__setitem__(0, 1)
    return x


def writes_by_operator_setitem(self, x):
    operator.setitem(x, 0, 1)
    return x


def writes_by_foreach(self, x):
    torch._foreach_mul_([x], 2)
    return x


def writes_to_the_output_of_a_module_named_like_a_function(self, x):
    y = self.pad(x)
    y += 1
    return x


def keeps_input_with_a_flag_off(self, x):
    return F.relu(x, False) + F.dropout(x, 0.5, self.training)


def keeps_input_and_extends_a_list(self, x):
    found = []
    found += [x]
    found[0] = x + 1
    return found


def writes_through_the_result_of_a_call(self, x):
    x.view(-1)[0] = 0
    return x


def writes_to_an_argument_that_becomes_a_list(self, x):
    x[0] = 0
    x = [x]
    return x


WRITES = {k: v for k, v in list(globals().items()) if k.startswith("writes_")}
KEEPS = {k: v for k, v in list(globals().items()) if k.startswith("keeps_")}


def written(function: types.FunctionType) -> list[str]:
    tree = definition_of(function).tree
    return list(written_names(tree, Scope(function, tree)))


@pytest.mark.parametrize("how", WRITES)
def test_in_place_writes_are_found(how: str) -> None:
    assert any(written(WRITES[how]))


@pytest.mark.parametrize("how", KEEPS)
def test_code_that_keeps_the_input_writes_to_no_name(how: str) -> None:
    assert not written(KEEPS[how])
