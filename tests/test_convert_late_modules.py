"""Modules that are added to a converted model, such as adapters, and removed again: the order of `convert` and the
change makes no difference."""

import copy
import gc
import io
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ckpt_kernels
from ckpt_kernels.convert.late_modules import late_conversion_of
from ckpt_kernels.memory import saved_bytes

from .conftest import DEVICE

WIDTH = 32
LEVELS = ("block", "output", "all", "layer")


class Adapter(nn.Module):
    """LoRA adapters of a linear layer, each with a dropout."""

    def __init__(self, base_layer: nn.Linear, p: float) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.drop = nn.ModuleDict({"first": nn.Dropout(p) if p else nn.Identity()})
        self.down = nn.ModuleDict({"first": nn.Linear(base_layer.in_features, 4, bias=False)})
        self.up = nn.ModuleDict({"first": nn.Linear(4, base_layer.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        for name in self.drop:
            result = result + self.up[name](self.down[name](self.drop[name](x)))
        return result


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.value = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.last = nn.Linear(3 * WIDTH, WIDTH, bias=False)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.gate(x)) * self.value(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.mlp = GatedMLP()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def made() -> Model:
    torch.manual_seed(0)
    return Model().to(DEVICE)


def adapted(model: Model, p: float) -> Model:
    torch.manual_seed(1)
    for layer in model.body.layers:
        for name in ("gate", "value", "last"):
            setattr(layer.mlp, name, Adapter(getattr(layer.mlp, name), p).to(DEVICE))
    return model


def merged(model: Model) -> Model:
    for layer in model.body.layers:
        for name in ("gate", "value", "last"):
            setattr(layer.mlp, name, getattr(layer.mlp, name).base_layer.requires_grad_(True))
    return model


def rows(*shape: int) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(*(shape or (16, WIDTH)), device=DEVICE)


def gradients(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    model(rows()).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def steps(level: str | None, p: float, order: str) -> list[tuple[int, list[Tensor]]]:
    """Saved bytes and gradients: with adapters, with a second adapter in each, with one again, and without adapters."""
    model, found = made(), []

    def convert_if(moment: str) -> None:
        if level is not None and order == moment:
            ckpt_kernels.convert(model, recompute=level)

    def measure() -> None:
        found.append((saved_bytes(model, rows()), gradients(model)))

    convert_if("before")
    adapted(model, p)
    convert_if("after")
    measure()
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    torch.manual_seed(4)
    for adapter in adapters:
        adapter.drop["second"] = nn.Dropout(p) if p else nn.Identity()
        adapter.down["second"] = copy.deepcopy(adapter.down["first"])
        adapter.up["second"] = copy.deepcopy(adapter.up["first"])
    measure()
    for adapter in adapters:
        for held in (adapter.drop, adapter.down, adapter.up):
            del held["second"]
    measure()
    merged(model)
    measure()
    return found


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("level", LEVELS)
def test_adapters_before_and_after_convert_are_the_same(level: str, p: float) -> None:
    before, after, eager = steps(level, p, "before"), steps(level, p, "after"), steps(None, p, "")
    for (kept, gradients), (kept_after, gradients_after), (kept_eager, expected) in zip(
        before, after, eager, strict=True
    ):
        assert kept == kept_after
        assert kept <= kept_eager
        for gradient, other, eager_gradient in zip(gradients, gradients_after, expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=0, atol=0)
            if not p:
                torch.testing.assert_close(gradient, eager_gradient)
    # Eager torch keeps the mask and the output of a dropout.
    bound = 0.95 if level == "block" else 0.75
    assert all(kept < bound * kept_eager for (kept, _), (kept_eager, _) in zip(before, eager, strict=True) if p)
    # On CUDA torch's RMSNorm keeps no intermediates.
    assert before[3][0] < (0.8 if DEVICE == "cpu" else 0.85) * eager[3][0]


def test_a_submodule_called_alone_discards_outputs() -> None:
    model, eager = made(), saved_bytes(made().body, rows())
    ckpt_kernels.convert(model)
    assert saved_bytes(model.body, rows()) < 0.8 * eager
    model.body.norm = nn.LayerNorm(WIDTH).to(DEVICE)
    model.body(rows())
    assert ckpt_kernels.is_converted(model.body.norm)


def test_a_layer_called_alone_converts_late_modules() -> None:
    model = made()
    ckpt_kernels.convert(model, recompute="layer")
    layer = model.body.layers[0]
    layer.norm = nn.LayerNorm(WIDTH).to(DEVICE)
    layer(rows())
    assert ckpt_kernels.is_converted(layer.norm)


@pytest.mark.parametrize("level", LEVELS)
def test_the_report_and_revert_include_late_modules(level: str) -> None:
    model = made()
    report = ckpt_kernels.convert(model, recompute=level)
    count = len(report.replaced)
    adapted(model, 0.5)
    model.body.norm = nn.LayerNorm(WIDTH).to(DEVICE)
    with torch.no_grad():
        model(rows())
    assert len(report.replaced) == count
    model(rows())
    by_name = {entry.name: entry.by for entry in report.replaced}
    assert by_name["body.layers.1.mlp.gate.drop.first"] == "bias_act (dropout)"
    # Six dropouts; at levels that discard outputs also the six adapters that contain the dropouts.
    new = 6 if level == "block" else 12
    assert by_name["body.norm"] == "layer_norm" and len(by_name) == len(report.replaced) == count + new
    ckpt_kernels.revert(model)
    assert not any(map(ckpt_kernels.is_converted, model.modules()))
    assert type(model.body.norm) is nn.LayerNorm
    model(rows())
    assert not any(map(ckpt_kernels.is_converted, model.modules()))


def test_reverted_and_excluded_modules_stay_unconverted() -> None:
    model = made()
    model.body.extra = nn.Dropout(0.5)
    ckpt_kernels.convert(model, exclude=["body.extra"])
    ckpt_kernels.revert(model.body.layers[0])
    adapted(model, 0.5)
    for _ in range(2):
        model(rows())
        first, second = model.body.layers
        assert type(first.norm) is nn.RMSNorm and ckpt_kernels.is_converted(second.norm)
        assert type(model.body.extra) is nn.Dropout
    assert ckpt_kernels.is_converted(first.mlp.gate.drop["first"])


@pytest.mark.parametrize(
    ("choice", "first", "last"),
    [
        ({"exclude": ["*.gate"]}, False, True),
        ({"exclude": [nn.Dropout]}, False, False),
        ({"include": ["body.layers.0*"]}, True, False),
        ({"include": [nn.RMSNorm]}, False, False),
        ({"recompute": {"*": "output", "*.layers.0": "none"}}, False, True),
    ],
)
def test_selections_apply_to_late_modules(choice: dict, first: bool, last: bool) -> None:
    model = made()
    report = ckpt_kernels.convert(model, **choice)
    adapted(model, 0.5)(rows())
    at_first, at_last = model.body.layers[0].mlp.gate, model.body.layers[1].mlp.last
    assert ckpt_kernels.is_converted(at_first.drop["first"]) is first
    assert ckpt_kernels.is_converted(at_last.drop["first"]) is last
    reasons = {entry.name: entry.reason for entry in report.left_alone}
    assert first or "recompute" in choice or reasons["body.layers.0.mlp.gate.drop.first"] == "not selected"
    # The adapters themselves are converted too, unless their dropouts are excluded.
    if choice != {"exclude": [nn.Dropout]}:
        assert ckpt_kernels.is_converted(at_first) is first and ckpt_kernels.is_converted(at_last) is last


def copied_by_pickle(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copied_by_pickle])
def test_copies_convert_late_modules(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = made()
    model.body.extra = nn.Dropout(0.5)
    report = ckpt_kernels.convert(model, exclude=["body.extra", "*.gate"])
    ckpt_kernels.revert(model.body.layers[0])
    count, names = len(report.replaced), set(vars(model))
    other = copied(copied(model))
    assert set(vars(model)) == names
    adapted(other, 0.5)(rows())
    assert set(vars(other)) == names == set(vars(model))
    assert type(other.body.extra) is nn.Dropout and type(other.body.layers[0].norm) is nn.RMSNorm
    assert ckpt_kernels.is_converted(other.body.layers[0].mlp.last.drop["first"])
    assert not ckpt_kernels.is_converted(other.body.layers[0].mlp.gate.drop["first"])
    assert len(report.replaced) == count


def test_a_shallow_copy_takes_nothing_from_the_model() -> None:
    model = made()
    ckpt_kernels.convert(model)
    other = copy.copy(model)
    other._modules = {**model._modules, "extra": nn.Dropout(0.5)}
    other(rows())
    assert ckpt_kernels.is_converted(other._modules["extra"])
    del other
    gc.collect()
    adapted(model, 0.5)(rows())
    assert ckpt_kernels.is_converted(model.body.layers[0].mlp.last.drop["first"])


@pytest.mark.parametrize("copied", [copy.deepcopy, copied_by_pickle])
def test_a_copy_of_a_submodule_converts_no_late_modules(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = made()
    ckpt_kernels.convert(model)
    part = copied(model.body)
    assert late_conversion_of(model.body) is not None and late_conversion_of(part) is None


def test_several_copies_of_one_state() -> None:
    model = made()
    ckpt_kernels.convert(model)
    construct, arguments, state, *_ = model.__reduce_ex__(4)
    for _ in range(2):
        other = construct(*arguments)
        other.__setstate__(state)
        assert late_conversion_of(other) is not None


class OwnActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def test_late_modules_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = made(), []
    ckpt_kernels.convert(model)
    model.body.own = OwnActivation()
    model.body.late = nn.GELU()

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        calls.append(x)
        return x

    monkeypatch.setattr(nn.GELU, "forward", forward)
    model(rows())
    assert not calls
    assert type(model.body.own) is OwnActivation and type(model.body.late) is nn.GELU


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_recomputes_with_the_same_dropout(reentrant: bool) -> None:
    """A reentrant checkpoint runs the forward first without gradients; the dropout must not be converted in between."""
    model = nn.Sequential(nn.Dropout(0.5), nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Flatten(0))
    ckpt_kernels.convert(model)
    model[1] = nn.Dropout(0.5)
    x = rows().requires_grad_()
    output = checkpoint(model, x, use_reentrant=reentrant)
    output.sum().backward()
    torch.testing.assert_close(x.grad.flatten() * x.detach().flatten(), output.detach())


def test_a_module_with_two_names_is_converted_once() -> None:
    model = made()
    report = ckpt_kernels.convert(model)
    model.body.extra = model.extra = nn.GELU()
    model(rows())
    assert [entry.by for entry in report.replaced if entry.kind == "GELU"] == ["bias_act (gelu)"]


def test_fewer_adapters_than_before_are_converted() -> None:
    model = made()
    ckpt_kernels.convert(model)
    adapted(model, 0.0)(rows())
    merged(model)(rows())
    model.body.layers[0].mlp.last = Adapter(model.body.layers[0].mlp.last, 0.0).to(DEVICE)
    model(rows())
    assert ckpt_kernels.is_converted(model.body.layers[0].mlp.last)


def test_removed_modules_are_freed() -> None:
    model = made()
    ckpt_kernels.convert(model)
    adapted(model, 0.5)(rows())
    gone = weakref.ref(model.body.layers[0].mlp.gate.drop["first"])
    assert ckpt_kernels.is_converted(gone())
    merged(model)
    gc.collect()
    assert gone() is None
    holder = weakref.ref(model)
    del model
    gc.collect()
    assert holder() is None


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_peft(order: str, dora: bool) -> None:
    peft = pytest.importorskip("peft")
    targets = ["gate", "value", "last"]
    options = peft.LoraConfig(target_modules=targets, lora_dropout=0.25, r=4, use_dora=dora)
    model, eager = made(), peft.get_peft_model(made(), options)
    if order == "before":
        ckpt_kernels.convert(model)
    model = peft.get_peft_model(model, options)
    if order == "after":
        ckpt_kernels.convert(model)
    model.train(), eager.train()
    ratio = saved_bytes(model, rows()) / saved_bytes(eager, rows())
    assert ratio < (0.85 if dora else 0.8)
    assert all(ckpt_kernels.is_converted(m) for m in model.modules() if isinstance(m, nn.Dropout))
    plain, eager = model.merge_and_unload(), eager.merge_and_unload()
    plain.requires_grad_(True), eager.requires_grad_(True)
    assert saved_bytes(plain, rows()) < 0.7 * saved_bytes(eager, rows())
