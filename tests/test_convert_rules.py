"""Modules that `convert` fuses or leaves alone, reasons in the report, and changes of a module's parts afterwards."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels import memory

from .conftest import DEVICE
from .conversion import WIDTH, close, random_tensor, replacement_of, results_of

SEQUENTIALS = {
    "norm, act": (
        lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, 4)),
        "norm, activation",
        (6, WIDTH),
    ),
    "linear, act, linear": (
        lambda: nn.Sequential(nn.Linear(WIDTH, 64), nn.SiLU(), nn.Linear(64, WIDTH)),
        "MLP",
        (6, WIDTH),
    ),
    "linear, act, dropout, linear": (
        lambda: nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(inplace=True), nn.Dropout(0.0), nn.Linear(64, WIDTH)),
        "MLP",
        (6, WIDTH),
    ),
    "conv, norm, act, conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3)),
        "norm, activation",
        (2, 3, 9, 9),
    ),
    "conv, norm, relu6, conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(inplace=True), nn.Conv2d(8, 4, 3)),
        "norm, activation",
        (2, 3, 9, 9),
    ),
    "conv, group norm, act": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3)),
        "norm, activation",
        (2, 3, 9, 9),
    ),
    "instance norm, act": (
        lambda: nn.Sequential(nn.InstanceNorm2d(3, affine=True), nn.LeakyReLU(), nn.Conv2d(3, 4, 3)),
        "norm, activation",
        (2, 3, 9, 9),
    ),
}


@pytest.mark.parametrize("name", SEQUENTIALS)
@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
def test_sequentials_are_fused(name: str, training: bool) -> None:
    build, found, shape = SEQUENTIALS[name]

    def built() -> nn.Module:
        torch.manual_seed(0)
        return build().to(DEVICE).train(training)

    def kept(model: nn.Module) -> int:
        return memory.saved_bytes(lambda: model(random_tensor(*shape).requires_grad_()))

    eager, ours = built(), built()
    assert replacement_of(ckpt_kernels.convert(ours), "") == found
    assert close(results_of(ours, random_tensor(*shape)), results_of(eager, random_tensor(*shape)), 1e-5)
    # torch's in-place relu keeps no more either.
    assert kept(ours) < kept(eager) or (name == "linear, act, dropout, linear" and kept(ours) == kept(eager))


def test_each_chain_of_a_sequence_is_fused() -> None:
    def made(is_apart: bool) -> nn.Sequential:
        torch.manual_seed(0)
        norms = [nn.LayerNorm(WIDTH), nn.GELU(), nn.Identity(), nn.LayerNorm(WIDTH), nn.GELU()]
        for norm in norms[::3]:
            nn.init.normal_(norm.weight)
        parts = [*norms, nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(0.0), nn.Linear(64, WIDTH)]
        return nn.Sequential(*[nn.Sequential(part) for part in parts] if is_apart else parts).to(DEVICE)

    rows = random_tensor(4, WIDTH)
    kept = {}
    for level in ("block", "all"):
        for is_apart in (False, True):
            model = made(is_apart)
            report = ckpt_kernels.convert(model, recompute=level)
            assert (replacement_of(report, "") is None) is is_apart
            torch.testing.assert_close(model(rows), made(False)(rows))
            kept[level, is_apart] = memory.saved_bytes(model, random_tensor(4, WIDTH).requires_grad_())
    # The outputs of both norms, and what the activation in the MLP reads.
    assert kept["block", True] - kept["block", False] == 2 * rows.nbytes
    assert kept["all", False] < kept["all", True]


@pytest.mark.parametrize("activation", ("relu", "gelu", nn.SiLU()))
@pytest.mark.parametrize("norm_first", (True, False))
@pytest.mark.parametrize("kind", (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
def test_transformer_layers_of_torch(kind: type[nn.Module], norm_first: bool, activation: Any) -> None:
    torch.manual_seed(0)
    layer = kind(WIDTH, 4, 64, 0.0, activation, batch_first=True, norm_first=norm_first).to(DEVICE)
    inputs = [random_tensor(2, 5, WIDTH), random_tensor(2, 7, WIDTH)][: 1 + (kind is nn.TransformerDecoderLayer)]
    eager, kept = results_of(layer, *inputs), memory.saved_bytes(lambda: layer(*[i.requires_grad_() for i in inputs]))
    report = ckpt_kernels.convert(layer)
    assert "MLP" in replacement_of(report, "") and replacement_of(report, "norm1") == "layer_norm"
    assert close(results_of(layer, *inputs), eager, 1e-5)
    assert memory.saved_bytes(lambda: layer(*[i.requires_grad_() for i in inputs])) < kept
    layer.eval()
    ours = layer(*inputs)
    with torch.no_grad():
        fast = layer(*inputs)
    ckpt_kernels.revert(layer)
    torch.testing.assert_close(ours, layer(*inputs))
    with torch.no_grad():
        # torch's fast path, which on GPUs computes gelu by tanh.
        torch.testing.assert_close(fast, layer(*inputs))


class BasicBlock(nn.Module):
    """The residual block of torchvision."""

    def __init__(self, channels: int = 8, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = activation or nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None

    def forward(self, input: Tensor) -> Tensor:
        identity = input if self.downsample is None else self.downsample(input)
        out = self.relu(self.bn1(self.conv1(input)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


def block(**options: Any) -> BasicBlock:
    torch.manual_seed(0)
    return BasicBlock(**options).to(DEVICE)


IMAGE = (2, 8, 7, 7)


def test_a_residual_block_is_fused() -> None:
    eager_block, converted = block(), block()
    assert replacement_of(ckpt_kernels.convert(converted), "") == "norm, activation"
    assert close(results_of(converted, random_tensor(*IMAGE)), results_of(eager_block, random_tensor(*IMAGE)), 1e-5)
    for key, value in eager_block.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[key], value)


def test_hooks_on_fused_modules_are_called() -> None:
    model = block()
    ckpt_kernels.convert(model)
    expected = results_of(model, random_tensor(*IMAGE))
    model.load_state_dict(block().state_dict())
    seen: list[tuple[str, tuple]] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: seen.append((name, o.shape)))
        # torch allows no backward hook on an output that is written to in place.
        if name != "bn2":
            module.register_full_backward_hook(lambda m, i, o, name=name: seen.append((f"{name} back", o[0].shape)))
    model.relu.inplace = False
    assert close(results_of(model, random_tensor(*IMAGE)), expected, 1e-5)
    names = [name for name, _ in seen]
    assert names.count("relu") == names.count("relu back") == 2
    assert names.count("bn1") == names.count("bn1 back") == names.count("") == 1


def test_hooks_on_the_parts_of_an_mlp_are_called() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)).to(DEVICE)
    ckpt_kernels.convert(model, recompute="all")
    expected = model(random_tensor(3, WIDTH))
    for part in model:
        seen: list[Tensor] = []
        handle = part.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        torch.testing.assert_close(model(random_tensor(3, WIDTH)), expected)
        assert len(seen) == 1
        handle.remove()


class Exchanging(nn.Module):
    """Puts another module into the sequence that runs, behind itself, or removes all modules behind itself."""

    def __init__(self, sequence: nn.Sequential, name: str) -> None:
        super().__init__()
        self.others = (sequence, name)

    def forward(self, x: Tensor) -> Tensor:
        sequence, name = self.others
        if name == "none":
            del sequence[1:]
        else:
            sequence.register_module(name, nn.Tanh())
        return 2 * x


@pytest.mark.parametrize(
    ("name", "place"), [("1", 0), ("2", 0), ("3", 0), ("4", 0), ("new", 0), ("none", 0), ("new", 4)]
)
def test_a_child_that_exchanges_a_later_one(name: str, place: int) -> None:
    def made() -> nn.Sequential:
        torch.manual_seed(0)
        sequence = nn.Sequential(nn.Identity(), nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.Identity())
        sequence[place] = Exchanging(sequence, name)
        return sequence.to(DEVICE)

    eager, converted = made(), made()
    ckpt_kernels.convert(converted)
    x = torch.linspace(-1, 1, 4 * WIDTH, device=DEVICE).view(4, WIDTH)
    if name in ("new", "none"):
        for model in (eager, converted):
            with pytest.raises(RuntimeError, match=r"mutated|changed size"):
                model(x)
    else:
        torch.testing.assert_close(converted(x), eager(x))


def test_a_sequence_whose_class_gets_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ordered(nn.Sequential):
        pass

    sequence = Ordered(nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).to(DEVICE)
    eager = nn.Sequential(*reversed(sequence))
    report = ckpt_kernels.convert(sequence)
    assert replacement_of(report, "")
    monkeypatch.setattr(Ordered, "__iter__", lambda self: reversed(self._modules.values()), raising=False)
    x = random_tensor(4, WIDTH)
    torch.testing.assert_close(sequence(x), eager(x))


class WritesOver(nn.Module):
    """In-place writes to a tensor that is read again, or that is an argument."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.act = nn.Linear(WIDTH, WIDTH), nn.SiLU(inplace=True)
        self.drop, self.norm = nn.Dropout(0.0), nn.BatchNorm1d(WIDTH)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.first(input)
        if self.how == "function":
            nn.functional.silu(hidden, inplace=True)
        if self.how == "module":
            return self.act(hidden) * input + hidden
        if self.how == "relu":
            return hidden.relu_() * input + hidden
        if self.how == "gate":
            view = hidden.view(-1)
            hidden *= torch.sigmoid(hidden)
            return hidden + view.view_as(hidden)
        if self.how == "argument":
            input *= torch.sigmoid(hidden)
        if self.how == "residual":
            total = input * 1.0
            alias = total.view_as(total)
            total += self.norm(hidden)
            return torch.relu(total) + alias
        if self.how == "dropout":
            return torch.relu_(self.drop(hidden)) + hidden
        return hidden


@pytest.mark.parametrize("how", ("function", "module", "relu", "gate", "argument", "residual", "dropout"))
@torch.no_grad()
def test_visible_in_place_writes_still_happen(how: str) -> None:
    torch.manual_seed(0)
    model, given = WritesOver(how).to(DEVICE), random_tensor(6, WIDTH)
    expected = model(given)
    ckpt_kernels.convert(model)
    ours = random_tensor(6, WIDTH)
    torch.testing.assert_close(model(ours), expected)
    torch.testing.assert_close(ours, given)


def test_intermediates_with_other_readers_are_not_fused() -> None:
    class Twice(Decides):
        def forward(self, input: Tensor) -> Tensor:
            hidden = self.first(input)
            active = self.act(hidden)
            return self.last(active) + {"hidden": hidden, "active": active}[self.how].mean()

    for how in ("hidden", "active"):
        model = Twice(how).to(DEVICE)
        eager = results_of(model, random_tensor(3, WIDTH))
        report = ckpt_kernels.convert(model)
        assert replacement_of(report, "") is None and replacement_of(report, "act") == "bias_act (gelu)"
        assert close(results_of(model, random_tensor(3, WIDTH)), eager, 1e-5)


def test_a_hook_that_replaces_an_output_is_applied() -> None:
    model = block()
    ckpt_kernels.convert(model)
    handle = model.bn2.register_forward_hook(lambda module, inputs, output: output * 0)
    torch.testing.assert_close(model(random_tensor(*IMAGE)), random_tensor(*IMAGE).relu())
    handle.remove()
    assert not torch.equal(model(random_tensor(*IMAGE)), random_tensor(*IMAGE).relu())


def test_replaced_parts_and_changed_settings_are_read() -> None:
    model, twin = block(), block()
    ckpt_kernels.convert(model)
    results_of(model, random_tensor(*IMAGE)), results_of(twin, random_tensor(*IMAGE))
    for m in (model, twin):
        m.relu = nn.Hardtanh()
    assert close(results_of(model, random_tensor(*IMAGE)), results_of(twin, random_tensor(*IMAGE)), 1e-5)
    for m in (model, twin):
        torch.manual_seed(1)
        m.downsample = nn.Conv2d(8, 8, 1).to(DEVICE)
        m.bn1.eps = 0.5
        m.bn2.momentum = None
    assert close(results_of(model, random_tensor(*IMAGE)), results_of(twin, random_tensor(*IMAGE)), 1e-5)
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)


class Decides(nn.Module):
    """An MLP whose forward takes branches."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.calls = 0
        self.first, self.act, self.last = nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)

    def forward(self, input: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
        y = self.last(self.act(self.first(input)))
        if self.how == "value" and y.sum() > 0:
            y = -y
        if self.how == "shape" and input.shape[0] > 4:
            y = 2 * y
        if self.how == "training" and self.training:
            y = 2 * y
        if self.how == "child" and self.act.approximate == "tanh":
            y = 2 * y
        if self.how == "dtype" and y.dtype == torch.float64:
            y = 2 * y
        if self.how == "random" and torch.rand(()).item() > 2:
            y = -y
        if self.how == "random too" and random.random() > 2:
            y = -y
        if self.how == "attribute":
            self.calls += 1
        if self.how == "class" and isinstance(y, Tensor):
            y = 2 * y
        if self.how == "mark":
            input.mark = 1
        if self.how == "hasattr" and hasattr(input, "to_local"):
            y = 2 * y
        if self.how == "new tensor":
            y = y + torch.ones(())
        if mask is not None:
            y = y * mask
        return y * scale


@pytest.mark.parametrize("how", ("", "training", "dtype", "hasattr"))
def test_branches_are_followed_at_every_call(how: str) -> None:
    model = Decides(how).to(DEVICE)
    calls = (
        lambda: model(random_tensor(3, WIDTH)),
        lambda: model(random_tensor(6, WIDTH)),
        lambda: model(random_tensor(3, WIDTH), 3.0),
        lambda: model(random_tensor(3, WIDTH), mask=random_tensor(3, WIDTH)),
        lambda: model(input=random_tensor(3, WIDTH), scale=2.0),
        lambda: model.eval()(random_tensor(3, WIDTH)),
        lambda: model.double()(random_tensor(3, WIDTH, dtype=torch.float64)),
    )
    expected = [call() for call in calls]
    model.float().train()
    assert replacement_of(ckpt_kernels.convert(model), "") == "MLP"
    for call, value in zip(calls, expected, strict=True):
        torch.testing.assert_close(call(), value)


HOWS = ("value", "shape", "random", "random too", "attribute", "class", "mark", "new tensor")


@pytest.mark.parametrize("how", HOWS)
def test_side_effects_of_a_forward_stay(how: str) -> None:
    model, twin = Decides(how).to(DEVICE), Decides(how).to(DEVICE)
    twin.load_state_dict(model.state_dict())
    assert replacement_of(ckpt_kernels.convert(model), "") == "MLP"
    assert model.calls == 0
    for n in (3, 6):
        given = random_tensor(n, WIDTH), random_tensor(n, WIDTH)
        torch.testing.assert_close(model(given[0]), twin(given[1]))
        assert hasattr(given[0], "mark") == hasattr(given[1], "mark")
    assert model.calls == twin.calls


def test_settings_of_children_are_read_at_every_call() -> None:
    model, twin = Decides("child").to(DEVICE), Decides("child").to(DEVICE)
    twin.load_state_dict(model.state_dict())
    ckpt_kernels.convert(model)
    for approximate in ("none", "tanh", "none"):
        model.act.approximate = twin.act.approximate = approximate
        torch.testing.assert_close(model(random_tensor(3, WIDTH)), twin(random_tensor(3, WIDTH)))


def test_a_gate_that_broadcasts_is_left_to_torch() -> None:
    class Squeeze(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Conv2d(8, 8, 1)

        def forward(self, input: Tensor) -> Tensor:
            return input * torch.sigmoid(self.fc(input.mean((2, 3), keepdim=True)))

    model = Squeeze().to(DEVICE)
    eager = results_of(model, random_tensor(*IMAGE))
    ckpt_kernels.convert(model)
    assert close(results_of(model, random_tensor(*IMAGE)), eager, 1e-5)
