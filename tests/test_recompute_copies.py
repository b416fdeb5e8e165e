"""Copies of one view of a block's output, as of queries, keys and values, share a recipe."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from ckpt_kernels import functional as F
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.recompute import copies, discard_outputs
from ckpt_kernels.recompute.recipes import Claim

CHANNELS, SIZE = 16, 12


class Projections(nn.Module):
    """Three linear layers of normalised feature maps, of which each copies the transposed maps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CHANNELS))
        self.linears = nn.ModuleList(nn.Linear(CHANNELS, 2, bias=False) for _ in range(3))
        self.between = lambda rows: None

    def forward(self, x: Tensor) -> Tensor:
        rows = F.group_norm(x, 4, self.weight).transpose(1, 2)
        outputs = [self.linears[0](rows)]
        self.between(rows)
        return torch.stack([*outputs, *(linear(rows) for linear in self.linears[1:])])


def made() -> tuple[Projections, Tensor]:
    torch.manual_seed(0)
    return Projections(), torch.randn(2, CHANNELS, SIZE, requires_grad=True)


def gradients(model: nn.Module, x: Tensor, discards: bool) -> list[Tensor]:
    with discard_outputs() if discards else torch.enable_grad():
        loss = model(x).square().sum()
    return list(torch.autograd.grad(loss, [x, *model.parameters()]))


def count_group_norms(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """A list that gets an item for every group norm that is recomputed."""
    from ckpt_kernels.recompute import recipes

    made_again: list[None] = []
    make = recipes.Recipe._make

    def counted(recipe: recipes.Recipe) -> Tensor:
        made_again.append(None)
        return make(recipe)

    monkeypatch.setattr(recipes.Recipe, "_make", counted)
    return made_again


def test_three_readers_of_copies_share_one_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made()
    expected = gradients(model, x, False)
    made_again = count_group_norms(monkeypatch)
    found = gradients(model, x, True)
    assert all(map(torch.equal, found, expected))
    # The copy, by a recipe that makes the norm's output by another.
    assert len(made_again) <= 2
    kept = saved_bytes(discard_outputs()(model), x, parameters_of=model)
    assert kept < 2 * x.nbytes < saved_bytes(model, x, parameters_of=model)


@pytest.mark.parametrize("hidden", [True, False], ids=["unseen by autograd", "seen by autograd"])
def test_a_copy_from_after_a_write_has_no_recipe_of_before(hidden: bool) -> None:
    model, x = made()

    def write(rows: Tensor) -> None:
        if hidden:
            rows.detach().mul_(2)
        else:
            rows.mul_(2)

    model.between = write
    expected, found = (gradients(model, x, discards) for discards in (False, True))
    assert all(map(torch.equal, found, expected))


def test_copies_of_one_view_in_two_layouts() -> None:
    model, x = made()

    def copied(discards: bool) -> tuple[Tensor, ...]:
        with discard_outputs() if discards else torch.enable_grad():
            rows = F.group_norm(x, 4, model.weight).transpose(1, 2)
            transposed = torch.ops.aten._unsafe_view(rows.clone(), (2, 1, SIZE, CHANNELS))
            loss = rows.reshape(-1, CHANNELS).sin().sum() + transposed.sin().sum()
        return torch.autograd.grad(loss, [x, model.weight])

    assert all(map(torch.equal, copied(True), copied(False)))


def test_copies_in_two_contexts() -> None:
    model, x = made()
    expected = [2 * g for g in gradients(model, x, False)]
    rows = F.group_norm(x, 4, model.weight).transpose(1, 2)
    losses = []
    for _ in range(2):
        with discard_outputs():
            losses.append(torch.stack([linear(rows) for linear in model.linears]).square().sum())
    found = torch.autograd.grad(sum(losses), [x, *model.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


VIEWS = {
    "permuted": lambda rows: rows.permute(1, 0, 2),
    "one of several": lambda rows: rows.view(4, 3, 2, 16).unbind(2)[1].transpose(0, 1),
    "a part": lambda rows: rows.split(2, dim=1)[1].transpose(0, 1),
    "selected": lambda rows: rows.view(4, 3, 2, 16).transpose(0, 2).select(0, 1),
    "expanded": lambda rows: rows.unsqueeze(1).expand(4, 2, 6, 16).transpose(0, 2),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_copies_of_views(view: Callable[[Tensor], Tensor]) -> None:
    """A copy has its recipe from the chain of views, with the same bits as the copy."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, 16, requires_grad=True)
    weight = torch.randn(2, 16, requires_grad=True)

    def call() -> Tensor:
        return TF.linear(view(F.layer_norm(x, 16)), weight)

    with discard_outputs():
        product = call()
    copy = product.grad_fn.next_functions[0][0]._raw_saved_self.data.content
    assert isinstance(copy, Claim) and copy.recipe.rebuild.function is copies._copy
    found, expected = (torch.autograd.grad(y.square().sum(), [x, weight]) for y in (product, call()))
    assert all(map(torch.equal, found, expected))
