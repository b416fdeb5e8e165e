"""The C fast path of `recompute` builds the same cells and recipes as the Python code."""

import contextlib
import gc
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ckpt_kernels import backends, recompute
from ckpt_kernels import functional as F
from ckpt_kernels.recompute import active, announcing, biases, fast_path, hooks
from ckpt_kernels.recompute.announcements import Announced
from ckpt_kernels.recompute.cells import Cell, Kept
from ckpt_kernels.recompute.discarder import Discarder
from ckpt_kernels.recompute.entries import Block, Entries, Entry
from ckpt_kernels.recompute.hooks import seekers
from ckpt_kernels.recompute.provenance import Trace
from ckpt_kernels.recompute.recipes import LONGEST_CHAIN, Claim, Recipe, geometry_of, layout_of

from .discarded_outputs import Parameters, model_of_all, random_tensor, same_bits, shows_saved
from .test_provenance_programs import Square, random_program

pytestmark = [
    pytest.mark.skipif(fast_path.library is None, reason="there is no _thin here"),
    pytest.mark.skipif(not shows_saved, reason="this torch does not show what nodes hold"),
]


@contextlib.contextmanager
def python_only() -> Iterator[None]:
    library, fast_path.library = fast_path.library, None
    try:
        yield
    finally:
        fast_path.library = library


def nodes_of(output: Tensor) -> list[Any]:
    waiting, seen = [output.grad_fn], set()
    for node in waiting:
        if node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions if before is not None]
    return waiting


def cells_of(output: Tensor) -> list[tuple[str, str, Cell]]:
    """All cells in the autograd graph of a tensor, each with the names of the node and of the attribute."""
    found = []
    for node in nodes_of(output):
        for name in sorted(name for name in dir(node) if name.startswith("_raw_saved")):
            held = getattr(node, name)
            for saved in held if isinstance(held, tuple) else [held]:
                if saved is not None and isinstance(saved.data, Cell):
                    found.append((node.name(), name, saved.data))
    return found


def described(cell: Cell) -> list[Any]:
    """The state of a cell, comparable between cells that C and Python made."""
    content, watch = cell.content, cell.watch
    found = [type(content), content.depth, cell.version, cell.is_clone, cell.is_unwritten(), type(cell.attached)]
    found += [type(watch), None if watch is None else (watch.numel(), watch._version)]
    if isinstance(content, Kept):
        found += [content.version, content.is_plain, content.tensor.shape, content.tensor.stride()]
        found += [content.tensor.requires_grad, content.tensor is watch]
    if isinstance(content, Claim):
        found += [content.geometry, content.served, content.made, len(content.recipe.claims)]
        found += [[type(o) for o in content.recipe.operands]]
    return found


def all_described(output: Tensor) -> list[Any]:
    return [(node, name, described(cell)) for node, name, cell in cells_of(output)]


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

    library, classes = fast_path.library, [Block, Cell, Claim, Discarder, Entries, Entry, Kept, Recipe]
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


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "a write": lambda t: t.detach().mul_(2),
    "freed memory": lambda t: t.untyped_storage().resize_(0),
    "other data": lambda t: setattr(t, "data", torch.zeros_like(t)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_the_same_error(change: str) -> None:
    def run() -> list[Any]:
        x, weight = random_tensor(4, 32).requires_grad_(), nn.Parameter(random_tensor(32, 32))
        with recompute.discard_outputs():
            output = TF.linear(F.layer_norm(x * 1, 32), weight).sum()
        CHANGES[change](weight)
        try:
            return [g.tolist() for g in torch.autograd.grad(output, (x, weight))]
        except RuntimeError as error:
            return [str(error)]

    found = run()
    with python_only():
        assert found == run()
    assert (len(found) == 1) == (change != "other data")


class Made:
    """A recipe for a tensor of 4 x 4, unpacked by C or by Python, which records how it runs."""

    def __init__(self, make: Callable[[Tensor], Tensor] = Tensor.clone, start: int = 0) -> None:
        self.make = make
        self.runs: list[tuple[str, bool, bool]] = []
        whole = random_tensor(4, 4)
        self.recipe = Recipe(self.rebuild, [Kept(whole, True), None], 1, layout_of(whole))
        self.claim = Claim(self.recipe, geometry_of(whole[start:]))
        self.cell = Cell(self.claim, None, 0, None)

    def rebuild(self, kept: Tensor, nothing: None) -> Tensor:
        self.runs.append((backends.chosen(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return self.make(kept)

    def unpacked(self, unpack: Callable[[Cell], Tensor]) -> Any:
        try:
            found = unpack(self.cell)
        except RuntimeError as error:
            return str(error)
        return found.dtype, found.tolist(), geometry_of(found), found.is_inference(), found.requires_grad, self.runs


AROUND: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "nothing": contextlib.nullcontext,
    "gradients": torch.enable_grad,
    "inference": torch.inference_mode,
    "another backend": lambda: backends.serving("reference"),
}


@pytest.mark.parametrize("around", AROUND)
def test_recipes_run_as_in_python(around: str) -> None:
    in_c, in_python = Made(), Made()
    with torch.no_grad(), AROUND[around]():
        found, expected = in_c.unpacked(fast_path.library.unpack), in_python.unpacked(lambda cell: cell.get())
    assert found == expected
    assert in_c.runs == [(backends.chosen(), False, False)]


@pytest.mark.parametrize("start", (0, 1))
@pytest.mark.parametrize(
    "make",
    (
        Tensor.clone,
        lambda kept: kept.t().contiguous().t(),
        lambda kept: torch.cat([kept[:1], kept])[1:],
        Tensor.double,
        lambda kept: kept[:2].clone(),
    ),
    ids=("as it was", "other strides", "an offset", "another dtype", "another shape"),
)
def test_tensors_made_again_are_laid_out_as_in_python(make: Callable[[Tensor], Tensor], start: int) -> None:
    with torch.no_grad():
        found = Made(make, start).unpacked(fast_path.library.unpack)
        expected = Made(make, start).unpacked(lambda cell: cell.get())
    assert found == expected


def test_an_interrupt_in_a_recipe_is_raised() -> None:
    def interrupted(kept: Tensor) -> Tensor:
        raise KeyboardInterrupt

    made = Made(interrupted)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        fast_path.library.unpack(made.cell)
    assert len(made.runs) == 1


def test_only_the_thread_that_seeks_identities_gets_no_values() -> None:
    made, own = Made(), threading.get_ident()
    with torch.no_grad():
        seekers.append(own)
        try:
            assert fast_path.library.unpack(made.cell).numel() == 0 and not made.runs
        finally:
            seekers.remove(own)
        seekers.append(own + 1)
        try:
            assert fast_path.library.unpack(made.cell).numel() == 16 and made.runs
        finally:
            seekers.remove(own + 1)


@pytest.mark.parametrize("is_first_gone", (False, True))
def test_two_claims_are_served_by_one_run(is_first_gone: bool) -> None:
    made = Made()
    cells = [made.cell, Cell(Claim(made.recipe, made.claim.geometry), None, 0, None)]
    found: list[Tensor] = []

    def unpack(gradient: Tensor) -> None:
        found.append(fast_path.library.unpack(cells[0]))
        if is_first_gone:
            del cells[0], made.cell, made.claim
        found.append(fast_path.library.unpack(cells[-1]))

    x = torch.ones(1, requires_grad=True)
    x.register_hook(unpack)
    (x * 1).backward()
    assert len(made.runs) == 1 and same_bits(*found)


def test_no_announcement_outlives_its_op() -> None:
    def count() -> int:
        gc.collect()
        return sum(type(each) is Announced for each in gc.get_objects())

    before = count()
    with recompute.discard_outputs():
        h = random_tensor(4, 8).requires_grad_()
        for _ in range(3):
            h = F.layer_norm(h, 8)
        assert count() == before
    assert count() == before


@pytest.mark.parametrize("depth", (LONGEST_CHAIN, LONGEST_CHAIN + 1))
def test_the_length_of_chains_is_that_of_python(depth: int) -> None:
    with recompute.discard_outputs():
        h = F.layer_norm(random_tensor(4, 8).requires_grad_(), 8)
        discarder = active.thread.active[-1]
        h.grad_fn.recomputed_block.entry.recipe().depth = depth
        found, expected = fast_path.library.packer(discarder)(h), discarder.pack(h)
    assert type(found.content) is type(expected.content) is (Kept if depth > LONGEST_CHAIN else Claim)


def test_a_context_that_another_thread_closed_removes_its_hooks() -> None:
    context = recompute.discard_outputs()
    context.__enter__()
    thread = threading.Thread(target=context.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert hooks.top_hooks() is not None
    x = random_tensor(4).requires_grad_()
    _ = x * x
    assert hooks.top_hooks() is None


def test_a_noted_operand_needs_no_recipe() -> None:
    """A small shift, which a product made: the recipe of the sum copies the shift."""
    x, weight = random_tensor(64, 32).requires_grad_(), random_tensor(32, 32, seed=1).requires_grad_()
    small = random_tensor(1, 32, seed=2)
    for context in (contextlib.nullcontext(), python_only()):
        with context, recompute.discard_outputs():
            h, shift = F.layer_norm(x, 32), small @ weight
            total = h + shift
            announcing.note(total, h, shift)
            read = TF.linear(total, weight)
            assert Claim in [type(cell.content) for name, _, cell in cells_of(read) if name == read.grad_fn.name()]


class Announcing(torch.autograd.Function):
    """Announces a recipe for the first result of `compute`, and saves so many tensors; with -1, the result."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Tensor], saved: int, total: Any, *tensors: Tensor) -> Tensor:
        output = compute(*tensors)
        second = None if total is None else (tensors[0], (compute, tensors))
        announcing.announce((compute, tensors), False, second)
        ctx.save_for_backward(*(tensors[:saved] if saved >= 0 else [output]))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        raise NotImplementedError


def doubled(x: Tensor, *others: Tensor) -> Tensor:
    return x * 2


def last_rows(x: Tensor, *others: Tensor) -> Tensor:
    return torch.cat([x, x * 2])[x.shape[0] :]


def foreign_hooks() -> contextlib.AbstractContextManager:
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


# The function, the number of saved tensors, whether there is a second result, and a change of the context.
ANNOUNCED: dict[str, tuple[Callable[..., Tensor], int, Any, dict[str, bool]]] = {
    "usual": (doubled, 1, None, {}),
    "offset": (last_rows, 1, None, {}),
    "empty": (lambda x, *others: (x * 2)[:0], 1, None, {}),
    "nothing saved": (doubled, 0, None, {}),
    "the result is saved": (doubled, -1, None, {}),
    "several processes": (doubled, 1, None, {"may_be_sharded": True}),
    "closed": (doubled, 1, None, {"is_closed": True}),
    "paused": (doubled, 1, None, {"is_paused": True}),
    "a total": (doubled, 1, True, {}),
    "a total in a layer": (doubled, 1, True, {"is_in_layer": True}),
}


OTHERS: dict[str, Callable[[Tensor, Tensor], Sequence[Tensor]]] = {
    "none": lambda x, weight: (),
    "a leaf": lambda x, weight: (weight,),
    "a product": lambda x, weight: (x @ weight,),
    "a small product": lambda x, weight: (x @ weight[:, :1],),
    "a block's output": lambda x, weight: (F.layer_norm(x, 8),),
    "a view": lambda x, weight: (x.t(),),
}


@pytest.mark.parametrize("inside", (contextlib.nullcontext, foreign_hooks, torch.no_grad))
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("case", ANNOUNCED)
def test_announcements_equal_pythons(case: str, other: str, inside: Callable[[], Any]) -> None:
    """With another operand, which nothing saves."""
    compute, saved, total, options = ANNOUNCED[case]

    def run() -> list[Any]:
        x, weight = random_tensor(8, 8).requires_grad_(), random_tensor(8, 8, seed=1).requires_grad_()
        with recompute.discard_outputs():
            discarder = active.thread.active[-1]
            given = [x, *OTHERS[other](x, weight)]
            for name, value in options.items():
                setattr(discarder, name, value)
            with inside():
                output = Announcing.apply(compute, saved, total, *given)
                announced = discarder.announced
                found = [None if announced is None else (len(announced.saved), type(announced.total))]
                announcing.record(output)
            block = getattr(output.grad_fn, "recomputed_block", "none")
            recipe = block.entry.recipe() if isinstance(block, Block) else block
            found += [discarder.announced, type(recipe), len(discarder.all_entries), discarder in active.thread.active]
            if isinstance(recipe, Recipe):
                found += [recipe.depth, recipe.layout, [type(operand) for operand in recipe.operands]]
        return found

    found = run()
    with python_only():
        assert found == run()


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


def test_versions_of_biases_equal_pythons() -> None:
    shared = nn.Linear(4, 4)
    module = nn.Sequential(
        shared, nn.BatchNorm1d(4), nn.ModuleList([shared, nn.Sequential(nn.Linear(4, 4, bias=False))])
    )
    module.register_parameter("nothing", None)
    shared.bias.data = shared.bias.data.clone()
    with torch.no_grad():
        shared.bias.add_(1)
    found, expected = fast_path.biases(module), biases.versions_in(module)
    assert found == expected is not None and len(expected) == 3
    assert fast_path.biases(nn.Linear(2, 2, bias=False)) == {}
    module.append(nn.LazyLinear(3))
    assert fast_path.biases(module) is None
    assert fast_path.biases(object()) is None


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
