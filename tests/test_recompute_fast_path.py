"""The C fast path of `recompute` packs saved tensors in the same cells as the Python code."""

import contextlib
import gc
import random
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ckpt_kernels import functional as F
from ckpt_kernels import recompute
from ckpt_kernels.recompute import announcing, biases, fast_path
from ckpt_kernels.recompute.announcements import Announced
from ckpt_kernels.recompute.cells import Cell, Kept
from ckpt_kernels.recompute.discarder import Discarder
from ckpt_kernels.recompute.entries import Block, Entry
from ckpt_kernels.recompute.provenance import Trace
from ckpt_kernels.recompute.recipes import Claim, Recipe
from ckpt_kernels.recompute.untracked import untracked

from .discarded_outputs import Parameters, model_of_all, random_tensor, same_bits, shows_saved
from .packed_cells import all_described, cells_of, described, python_only
from .test_provenance_programs import Square, random_program

pytestmark = [
    pytest.mark.skipif(fast_path.library is None, reason="there is no _thin here"),
    pytest.mark.skipif(not shows_saved, reason="this torch does not show what nodes hold"),
]


def model_of_casts(x: Tensor, p: Parameters) -> Tensor:
    """A model with casts of autocast, copies of products, and sums that norms read."""
    with torch.autocast(x.device.type, torch.bfloat16):
        h = TF.linear(F.layer_norm(x, 32), p["a"], p["bias"])
        q, k, v = (t.transpose(0, 1).contiguous() for t in TF.linear(h, p["b"]).view(8, 8, 4, 8).unbind(2)[:3])
        mixed = (q * k).transpose(0, 1).reshape(8, -1) @ v.reshape(64, 8)
        return x + TF.linear(F.rms_norm(x + h, 32, activation="silu"), p["c"]) + mixed.float().mean()


MODELS = [model_of_all, model_of_casts]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("level", ["block", "output", "all", "layer"])
def test_cells_of_models_equal_pythons(model: Callable[[Tensor, Parameters], Tensor], level: str) -> None:
    p = Parameters()
    x = random_tensor(64, 32, seed=1).requires_grad_()

    def run() -> tuple[list[Any], list[Tensor]]:
        module = nn.Module()
        output = recompute.run_at(level, lambda: model(x, p), module, (), {})
        found = all_described(output)
        return found, list(torch.autograd.grad(output.square().sum(), [x, p["a"]]))

    found, gradients = run()
    with python_only():
        expected, expected_gradients = run()
    assert found == expected and len(found) > 10
    assert all(map(same_bits, gradients, expected_gradients))


@pytest.mark.parametrize("part", range(4))
def test_cells_of_random_programs_equal_pythons(part: int) -> None:
    p = Square()
    x = random_tensor(16, 16).requires_grad_()
    for seed in range(part * 25, part * 25 + 25):
        options = {"products": seed % 2 == 1, "temporaries": seed % 3 == 0}

        def run(seed: int = seed, options: dict[str, bool] = options) -> list[Any]:
            with recompute.discard_outputs(**options):
                return all_described(random_program(seed, x, p, 3 + seed % 20))

        found = run()
        with python_only():
            assert found == run()


def noted_program(seed: int, x: Tensor, p: Parameters) -> Tensor:
    """A sum of losses after random ops, noted as by `convert`; views and copies of their results; and writes."""
    choose = random.Random(seed)
    values, losses = [x * 1.5, F.layer_norm(x, 16)], []

    def noted(output: Tensor, *operands: Any) -> Tensor:
        if choose.random() < 0.7:
            announcing.note(output, *operands)
        return output

    ops: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda a, b: noted(a + b, a, b),
        lambda a, b: noted(a * b, a, b),
        lambda a, b: noted(a + 1, a, 1),
        lambda a, b: noted(a + b[:1], a, b[:1]),
        lambda a, b: noted(torch.cat([a, b]), a, b)[8:24],
        lambda a, b: noted(a + p["e"], a, p["e"]),
        lambda a, b: noted(a + p["bias"], a, p["bias"]),
        lambda a, b: a / 2,
        lambda a, b: a.exp() - b,
        lambda a, b: a.t().contiguous(),
        lambda a, b: a.unsqueeze(0).expand(2, 16, 16).reshape(32, 16)[4:20],
        lambda a, b: a.view(2, 8, 16).transpose(0, 1).reshape(16, 16),
        lambda a, b: p["e"].unsqueeze(0).expand(2, 16, 16)[1] + 0,
        lambda a, b: F.layer_norm(a, 16, activation="silu"),
        lambda a, b: F.layer_norm(a, 16).add_(b),
        lambda a, b: (a @ p["a"]).add_(b),
        lambda a, b: TF.dropout(a, 0.5),
    ]
    for _ in range(3 + seed % 20):
        values.append(choose.choice(ops)(choose.choice(values), choose.choice(values)))
        if choose.random() < 0.4:
            losses.append(TF.linear(choose.choice(values), p["b"]).sin().sum())
    return sum(losses + [TF.linear(value, p["a"]).sin().sum() for value in values[-3:]])


@pytest.mark.parametrize("part", range(4))
def test_cells_of_noted_programs_equal_pythons(part: int) -> None:
    p = Square()
    p["bias"] = nn.Parameter(random_tensor(16))
    x = random_tensor(16, 16).requires_grad_()
    for seed in range(part * 40, part * 40 + 40):

        def run(seed: int = seed) -> list[Any]:
            torch.manual_seed(seed)
            with recompute.discard_outputs(products=seed % 2 == 1, temporaries=seed % 5 == 0):
                return all_described(noted_program(seed, x, p))

        found = run()
        with python_only():
            assert found == run()


@contextlib.contextmanager
def no_python(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(*arguments: Any) -> Any:
        raise AssertionError("Python was called")

    with monkeypatch.context() as patch:
        used = (Discarder, "pack"), (Discarder, "record"), (Announced, "__init__"), (biases, "versions_in")
        for owner, name in (*used, (Kept, "get"), (Claim, "get"), (Recipe, "serve")):
            patch.setattr(owner, name, fail)
        yield


def test_usual_cases_run_without_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and inputs, their transposed views, views of products, sums of products, blocks' outputs and views."""
    x = random_tensor(4, 8, 32, seed=1).requires_grad_()
    p = Parameters()
    norm, bias = torch.ones(32, requires_grad=True), p["bias"]
    layer = nn.ModuleList([nn.LayerNorm(32), nn.Linear(32, 32)])
    with no_python(monkeypatch), recompute.discard_outputs(layer):
        h = x + TF.linear(F.layer_norm(TF.linear(x, p["c"]), 32, norm, bias), p["a"], bias)
        q, k = (t.transpose(1, 2) for t in TF.linear(F.rms_norm(h, 32), p["b"]).view(4, 8, 2, 16).unbind(2)[:2])
        contiguous = (q @ k.transpose(1, 2)).contiguous()
        loss = (contiguous * contiguous.detach()).sum() + TF.log_softmax(h, -1).sum()
        loss.backward()


def test_results_out_of_reach_run_without_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of quotients, quotients of sums, sums with parameters of several dimensions, and written products."""
    x, weight = random_tensor(4, 8, 32, seed=1).requires_grad_(), nn.Parameter(random_tensor(32, 32))
    with no_python(monkeypatch), recompute.discard_outputs():
        total = x + TF.linear(x, weight)
        read = [(total / 2).expand(4, 8, 32).transpose(1, 2).reshape(4, 256), (total + 1) / 2]
        read.append(TF.linear(x, weight).add_(total))
        read.append(torch.cat([weight.unsqueeze(0).expand(2, 32, 32), weight.unsqueeze(0)]))
        loss = sum((each * torch.ones_like(each).requires_grad_()).sum() for each in read)
        loss.backward()


def test_sums_with_dropout_run_without_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dropout of a product has no recipe, because the recipe would keep the product; so the sum has none either."""

    def run() -> tuple[Tensor, Tensor]:
        x, weight = random_tensor(4, 32, seed=1).requires_grad_(), random_tensor(32, 32).requires_grad_()
        with recompute.discard_outputs():
            dropped = F.bias_act(TF.linear(x, weight), dropout_p=0.5)
            return dropped, TF.linear(x + dropped, weight)

    with no_python(monkeypatch):
        dropped, output = run()
    with python_only():
        expected, expected_output = run()
    assert dropped.grad_fn.recomputed_block is expected.grad_fn.recomputed_block is None
    assert all_described(output) == all_described(expected_output)


def test_a_block_that_saves_its_output_is_not_marked() -> None:
    x, weight = random_tensor(4, 32, seed=1).requires_grad_(), random_tensor(32, 32).requires_grad_()
    for context in (contextlib.nullcontext(), python_only()):
        with context, recompute.discard_outputs():
            output = F.bias_act(TF.linear(x, weight), activation="relu")
            assert not hasattr(output.grad_fn, "recomputed_block")


def test_a_view_of_an_output_is_unpacked_without_python(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = random_tensor(4, 32, seed=1).requires_grad_(), random_tensor(8, 3)
    expected = torch.autograd.grad((F.layer_norm(x, 32)[1:, 4:12] @ weight.requires_grad_()).sum(), [x, weight])
    with no_python(monkeypatch), recompute.discard_outputs():
        output = F.layer_norm(x, 32)[1:, 4:12] @ weight
        assert [type(cell.content) for _, _, cell in cells_of(output)].count(Claim) == 1
        assert all(map(same_bits, torch.autograd.grad(output.sum(), [x, weight]), expected))


def test_backward_passes_leave_the_same_claims() -> None:
    """For one reader and for two, in one backward pass and in two."""

    def run(readers: int) -> list[Any]:
        x, weight = random_tensor(4, 32, seed=1).requires_grad_(), random_tensor(32, 32).requires_grad_()
        with recompute.discard_outputs():
            h = F.rms_norm(x, 32)
            output = sum(TF.linear(h, weight) for _ in range(readers)).square()
        before = [described(cell) for _, _, cell in cells_of(output)]
        found: list[Any] = []
        for _ in range(2):
            found.append(torch.autograd.grad(output.sum(), [x, weight], retain_graph=True))
            claims = [cell.content for _, _, cell in cells_of(output) if isinstance(cell.content, Claim)]
            assert len(claims) == readers
            served = [claim.served for claim in claims]
            found.append((len(set(served)), -1 in served, [claim.made for claim in claims]))
        return [before, [[g.tolist() for g in each] if torch.is_tensor(each[0]) else each for each in found]]

    for readers in (1, 2):
        found = run(readers)
        with python_only():
            assert found == run(readers)


def test_references_to_storages_equal_torchs() -> None:
    tensor = torch.ones(8)
    found, expected = fast_path.library.storage_reference(tensor), StorageWeakRef(tensor.untyped_storage())
    assert found.cdata == expected.cdata == tensor.untyped_storage()._cdata
    assert not found.expired()
    del tensor
    assert found.expired() and expected.expired()
    # No new storage gets the address.
    assert found.cdata not in [torch.ones(8).untyped_storage()._cdata for _ in range(64)]


def test_a_reference_frees_all_that_it_holds() -> None:
    library, storage, dropped = fast_path.library, torch.UntypedStorage, []

    def drop(address: int) -> None:
        dropped.append(address)
        storage._free_weak_ref(address)

    tensor = torch.ones(8)
    kind = type(library.storage_reference(tensor))
    try:
        library.set_up_storages(storage._expired, drop)
        reference = library.storage_reference(tensor)
        address, held = reference.cdata, sys.getrefcount(kind)
        count = sys.getrefcount(address)
        del reference
        assert dropped == [address]
        dropped.clear()
        assert (sys.getrefcount(address), sys.getrefcount(kind)) == (count - 1, held - 1)
        # The reference goes while the error is raised.
        with pytest.raises(ZeroDivisionError):
            _ = library.storage_reference(tensor), 1 // 0
        assert dropped == [address]
    finally:
        library.set_up_storages(storage._expired, storage._free_weak_ref)


def test_the_library_needs_classes_with_slots() -> None:
    class Dynamic:
        pass

    class Without:
        __slots__ = ("announcement",)

    library, classes = fast_path.library, [Block, Cell, Claim, Discarder, Entry, Kept, Recipe]
    try:
        with pytest.raises(TypeError, match="the class has no slot announcement"):
            library.set_up_classes(Dynamic, *classes)
        with pytest.raises(AttributeError, match="is_elementwise"):
            library.set_up_classes(Without, *classes)
        with pytest.raises(TypeError, match="expected a class"):
            library.set_up_classes(3, *classes)
    finally:
        library.set_up_classes(Announced, *classes)
    with pytest.raises(TypeError, match="expected a Discarder"):
        library.packer(3)


def tensors() -> dict[str, Tensor]:
    """Tensors of many kinds by name."""
    x = random_tensor(4, 4).requires_grad_()
    written = x * 1
    written += 1
    with torch.no_grad():
        unseen = x.view(16)
    return {
        "a leaf": x,
        "a parameter": nn.Parameter(random_tensor(4)),
        "a view of a leaf": x.t(),
        "a view without a gradient": unseen,
        "detached": (x * 2).detach(),
        "a clone": x.clone(),
        "a view of a clone": x.clone()[1:],
        "a product": x @ x,
        "a view of a product": (x @ x).t(),
        "a sum of a product": (x @ x) + x.t(),
        "written": written,
        "an exponential": x.exp(),
        "a cast": x.double(),
        "a slice of a cast": x.double()[:2],
        "empty": torch.zeros(0, 4, requires_grad=True) * 2,
        "conjugate": torch.zeros(2, dtype=torch.complex64).conj(),
        "negative": torch.zeros(2, dtype=torch.complex64, requires_grad=True).conj().imag,
        "sparse": torch.eye(3).to_sparse().requires_grad_(),
        "meta": torch.zeros(3, device="meta", requires_grad=True) * 2,
        "integers": torch.arange(3),
    }


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("state", ["as it is", "closed", "paused", "within hooks", "in a layer"])
def test_cells_of_tensors_equal_pythons(state: str, products: bool) -> None:
    def packed(packing: Callable[[Discarder], Callable[[Tensor], Cell]]) -> dict[str, Any]:
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        with hooks if state == "within hooks" else contextlib.nullcontext():
            discarder = Discarder(None, products, False)
        discarder.is_closed, discarder.is_paused = state == "closed", state == "paused"
        if state == "in a layer":
            discarder.hold(random_tensor(4).requires_grad_() * 1)
        pack = packing(discarder)
        assert pack.__self__ is discarder  # type: ignore[attr-defined]
        return {name: described(pack(tensor)) for name, tensor in tensors().items()}

    assert packed(fast_path.library.packer) == packed(lambda discarder: discarder.pack)


def test_inference_tensors_are_the_same_error() -> None:
    with torch.inference_mode():
        tensor = torch.ones(3)
    discarder = Discarder(None, False, False)
    for pack in (fast_path.library.packer(discarder), discarder.pack):
        with pytest.raises(RuntimeError, match="Inference tensors do not track version counter"):
            pack(tensor)


def test_objects_made_in_c_have_every_slot() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    with recompute.discard_outputs():
        output = F.layer_norm(x, 8, activation="gelu")
        read = TF.linear(output, torch.randn(8, 8, requires_grad=True))
    block = output.grad_fn.recomputed_block
    claim = next(cell.content for _, _, cell in cells_of(read) if isinstance(cell.content, Claim))
    kept = next(cell for _, _, cell in cells_of(read) if isinstance(cell.content, Kept))
    for made in (claim, claim.recipe, block, block.entry, kept, kept.content):
        assert not [name for name in type(made).__slots__ if name != "__weakref__" and not hasattr(made, name)]


def test_a_class_without_the_collector_is_as_one_with_slots() -> None:
    class Three:
        """Three attributes."""

        __slots__ = ("__weakref__", "first", "second", "third")

        def __init__(self, first: Any, second: Any) -> None:
            self.first, self.second = first, second

        def both(self) -> list[Any]:
            return [self.first, self.second]

    made: Any = untracked(Three)
    assert made is not Three and (made.__name__, made.__module__, made.__doc__) == ("Three", __name__, Three.__doc__)
    count = sys.getrefcount(made)
    objects = [made(number, str(number)) for number in range(10)]
    assert [each.both() for each in objects] == [[number, str(number)] for number in range(10)]
    for each in objects:
        assert not hasattr(each, "third")
        each.third = each.first
        del each.first
        with pytest.raises(AttributeError):
            each.both()
    del objects, each
    assert sys.getrefcount(made) == count


def test_without_the_library_or_with_an_older_one_a_class_is_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class One:
        __slots__ = ("first",)

    with monkeypatch.context() as older:
        older.delattr(fast_path.library, "untracked")
        assert untracked(One) is One
    monkeypatch.setitem(sys.modules, "ckpt_kernels._thin", None)
    assert untracked(One) is One


def test_the_collector_does_not_know_cells() -> None:
    x, weight = random_tensor(4, 8, seed=1).requires_grad_(), random_tensor(8, 8).requires_grad_()
    with recompute.discard_outputs():
        read = TF.linear(F.layer_norm(x, 8, activation="gelu"), weight)
    cells = [cell for _, _, cell in cells_of(read)]
    objects = [*cells, *(cell.content for cell in cells)]
    assert {type(o) for o in objects} == {Cell, Kept, Claim}
    assert not any(map(gc.is_tracked, objects))
    # They are freed all the same, with their references.
    references = list(map(weakref.ref, [*objects, *(o.tensor for o in objects if isinstance(o, Kept))]))
    del objects, cells, read
    assert not any(reference() is not None for reference in references)


def test_gates_of_a_sum_are_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gates of a recurrent cell: nothing keeps their operands, which is found without a trace in Python."""
    x, weight = random_tensor(4, 32, seed=1).requires_grad_(), nn.Parameter(random_tensor(128, 32))

    def gated() -> Tensor:
        first, second, third, fourth = (TF.linear(x, weight) + TF.linear(x, weight)).chunk(4, -1)
        return torch.sigmoid(first) * TF.linear(x, weight[:32]) + torch.sigmoid(second) * torch.tanh(third) + fourth

    with python_only(), recompute.discard_outputs():
        expected = gated()
    traced: list[Any] = []
    step_for = Trace.step_for
    monkeypatch.setattr(Trace, "step_for", lambda self, node, *rest: traced.append(node) or step_for(self, node, *rest))
    with recompute.discard_outputs():
        found = gated()
    assert not traced
    kinds = [[(node, name, type(cell.content)) for node, name, cell in cells_of(each)] for each in (found, expected)]
    assert kinds[0] == kinds[1]
