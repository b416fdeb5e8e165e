"""The level "layer" with convolutions, split heads, attention as explicit matmuls, and hand-written norms."""

import contextlib
import copy
import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.memory import saved_bytes
from ckpt_kernels.recompute import layer

from .conftest import DEVICE
from .conversion import twins
from .test_layer import backward_ops

WIDTH, HEADS, TOKENS, CHANNELS = 32, 4, 24, 16


class Attention(nn.Module):
    """Attention as explicit matmuls, with all heads in one product. `written` says when the product is written to."""

    def __init__(self, written: str = "") -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.written = written

    def forward(self, x: Tensor) -> Tensor:
        both = self.qkv(x)
        if self.written == "before":
            with torch.no_grad():
                both[0].mul_(2)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in both.split(WIDTH, -1))
        weights = (torch.matmul(q, k.transpose(-1, -2)) * 0.5).softmax(-1)
        attended = torch.matmul(weights, v)
        if self.written == "after":
            with torch.no_grad():
                both[0].mul_(2)
        return self.out(attended.transpose(1, 2).reshape(x.shape))


class WrittenNorm(nn.LayerNorm):
    """A norm that stores the weight minus 1: no fused norm computes this, so the method is rewritten."""

    def forward(self, input: Tensor) -> Tensor:
        return TF.layer_norm(input, self.normalized_shape, self.weight + 1.0, self.bias, self.eps)


class Layer(nn.Module):
    """A method that only adds the outputs of other modules."""

    def __init__(self, written: str = "") -> None:
        super().__init__()
        self.first, self.second = WrittenNorm(WIDTH), WrittenNorm(WIDTH)
        self.attention = Attention(written)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        normed = self.second(x)
        return x + self.mlp(normed)


def step(model: nn.Module, *operands: Tensor) -> list[Tensor | None]:
    given = [operand.clone().requires_grad_() for operand in operands]
    output = model(*given)
    sources = [*given, *(p for p in model.parameters() if p.requires_grad)]
    return [output, *torch.autograd.grad(output.square().mean(), sources, allow_unused=True)]


def assert_same_bits(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for f, e in zip(found, expected, strict=True):
        assert (f is None and e is None) or (f is not None and e is not None and torch.equal(f, e))


def at_levels(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Two copies of the module as the only layer of a list, converted at "block" and at "layer"."""
    plain, twin = twins(lambda: nn.ModuleList([make()]))
    ckpt_kernels.convert(plain, recompute="block")
    ckpt_kernels.convert(twin, recompute="layer")
    return plain[0], twin[0]


def tokens() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, TOKENS, WIDTH, device=DEVICE)


@pytest.mark.parametrize("written", ["", "before", "after"])
def test_attention_as_explicit_matmuls(written: str) -> None:
    """Queries, keys and values run again unless they were written to before the read; the weights are kept."""
    plain, twin = at_levels(lambda: Layer(written))
    assert_same_bits(step(twin, tokens()), step(plain, tokens()))
    x = tokens().requires_grad_()
    weights = 2 * HEADS * TOKENS * TOKENS * 4
    kept = (saved_bytes(twin, x, parameters_of=twin) - weights) / x.nbytes
    # The input, attention's output, statistics of rows and copies of biases; after a write also the three parts, once.
    assert kept < 2.5 if written != "before" else 4.5 < kept < 5.5


def test_methods_are_rewritten_only_at_the_level_layer() -> None:
    """Other levels do not recompute the outputs of unconverted modules, so they do not rewrite the method."""
    model = nn.ModuleList([Layer()])
    report = ckpt_kernels.convert(model, recompute="output")
    assert "Layer" not in {entry.kind for entry in report.replaced if "recipes" in entry.by}
    report = ckpt_kernels.convert(model, recompute="layer")
    assert "Layer" in {entry.kind for entry in report.replaced if "recipes" in entry.by}


class Residual(nn.Module):
    """A residual block of a diffusion UNet; `last` makes the convolutions."""

    def __init__(self, last: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = nn.GroupNorm(4, CHANNELS), nn.GroupNorm(4, CHANNELS)
        self.conv1, self.conv2 = last(), last()
        self.time = nn.Linear(WIDTH, CHANNELS)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv1(self.act(self.first(x)))
        hidden = hidden + self.time(self.act(time))[:, :, None, None]
        hidden = self.conv2(self.act(self.second(hidden)))
        return (x + hidden) / 2.0


def images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, CHANNELS, 12, 12, device=DEVICE), torch.randn(2, WIDTH, device=DEVICE).requires_grad_()


def frozen_bias() -> nn.Module:
    made = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    assert made.bias is not None
    made.bias.requires_grad_(False)
    return made


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "3x3": (lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), 1.0),
    "no bias": (lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), 1.0),
    "groups": (lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=2, dilation=2, groups=CHANNELS), 1.0),
    "transposed": (lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1), 1.0),
    # The autograd graph does not show a frozen bias.
    "frozen bias": (frozen_bias, 2.0),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("around", ["", "autocast", "channels last"])
def test_convolutions_run_again(name: str, around: str) -> None:
    make, least = CONVOLUTIONS[name]
    plain, twin = at_levels(lambda: Residual(make))
    x, time = images()
    if around == "channels last":
        x = x.to(memory_format=torch.channels_last)
        plain, twin = (model.to(memory_format=torch.channels_last) for model in (plain, twin))
    context = torch.autocast(DEVICE, torch.bfloat16) if around == "autocast" else contextlib.nullcontext()
    with context:
        assert_same_bits(step(twin, x, time), step(plain, x, time))
        given = x.requires_grad_()
        kept, before = (saved_bytes(model, given, time, parameters_of=model) / x.nbytes for model in (twin, plain))
    if around != "autocast":
        assert least <= kept < least + 0.5
    assert kept < 0.7 * before


def test_the_last_convolution_runs_once() -> None:
    x, time = images()
    plain, twin = at_levels(lambda: Residual(CONVOLUTIONS["3x3"][0]))
    x.requires_grad_()
    before, after = (backward_ops(lambda x, model=model: model(x, time), x)["convolution"] for model in (plain, twin))
    assert (before, after) == (0, 1)


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = CHANNELS // 4
        self.conv1, self.norm1 = nn.Conv2d(CHANNELS, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.norm2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.norm3 = nn.Conv2d(inner, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.norm1(self.conv1(x)))
        hidden = self.act(self.norm2(self.conv2(hidden)))
        return self.act(x + self.norm3(self.conv3(hidden)))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.scale


class NormsInLists(nn.Module):
    """Lists of a norm and a linear layer."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList((nn.ModuleList((norm(),)), nn.Linear(WIDTH, WIDTH))) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for (norm,), linear in self.layers:
            x = x + linear(norm(x))
        return x


WITHOUT_LAYERS = {
    **{
        act.__name__: lambda act=act: nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), act(), nn.Linear(4 * WIDTH, WIDTH))
        for act in (nn.Tanh, nn.GELU)
    },
    "a norm": lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)),
    "norms in lists": lambda: NormsInLists(lambda: nn.LayerNorm(WIDTH)),
    "scaled norms in lists": lambda: NormsInLists(Scaled),
}


@pytest.mark.parametrize("name", WITHOUT_LAYERS)
def test_a_model_without_layers_keeps_what_it_keeps_at_all(name: str) -> None:
    """Linear layers, activations and norms in a list are no layers."""
    x = torch.randn(8, WIDTH, device=DEVICE)
    kept = {}
    for level in ("output", "all", "layer"):
        model = WITHOUT_LAYERS[name]().to(DEVICE)
        ckpt_kernels.convert(model, recompute=level)
        kept[level] = saved_bytes(model, x)
    assert kept["layer"] <= kept["all"] <= kept["output"]


def test_modules_of_a_sequential_are_layers() -> None:
    """Each bottleneck keeps its input; running statistics are updated once."""
    plain, twin = twins(lambda: nn.Sequential(*(Bottleneck() for _ in range(3))))
    ckpt_kernels.convert(plain, recompute="output")
    ckpt_kernels.convert(twin, recompute="layer")
    x, _ = images()
    assert_same_bits(step(twin, x), step(plain, x))
    for name, buffer in twin.state_dict().items():
        assert torch.equal(buffer, plain.state_dict()[name]), name
    x.requires_grad_()
    kept, before = (saved_bytes(model, x, parameters_of=model) / x.nbytes for model in (twin, plain))
    # The inputs of the three blocks, and the last output, which relu saves.
    assert kept < 4.2 < before


class WithParent(nn.Module):
    """A child that has its parent as a child."""

    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.parent = parent

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


def test_modules_that_contain_each_other() -> None:
    model = nn.Sequential()
    for name in "ab":
        model.add_module(name, WithParent(model))
    x = torch.randn(4, WIDTH)  # `model.to` would not return
    expected = model(x)
    assert ckpt_kernels.convert(model, recompute="layer").replaced
    torch.testing.assert_close(model(x), expected)


def test_convolutions_in_a_layer_without_convert() -> None:
    """Blocks read the outputs of convolutions."""
    norm, first, last = (
        ckpt_kernels.nn.GroupNorm(4, CHANNELS, activation="silu").to(DEVICE),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1).to(DEVICE),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1).to(DEVICE),
    )
    model = nn.Sequential(norm, first, norm, last)
    x = images()[0].requires_grad_()
    assert saved_bytes(layer(model), x, parameters_of=model) < 1.2 * x.nbytes < saved_bytes(model, x)
    assert_same_bits(step(Within(model), x.detach()), step(model, x.detach()))


class Within(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return layer(self.inner)(x)


def location_of_caller(message: str) -> str:
    """The file, line and function of the caller."""
    caller = inspect.getouterframes(inspect.currentframe())[1]
    return f"{message} in {caller.filename}, line {caller.lineno}, in {caller.function}"


def locals_of_caller(message: str) -> list[str]:
    """The names of the caller's local variables."""
    caller = inspect.getouterframes(inspect.currentframe())[1]
    return [message, *caller.frame.f_locals]


def frame_of_caller(message: str) -> list[object]:
    """The parts of the caller's frame record, in a call that may pass on any of them."""
    caller = inspect.getouterframes(inspect.currentframe())[1]
    return [message, *map(str, caller[1:4])]


class AsksForLocation(nn.Module):
    """A method that calls a function that inspects the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.answer = location_of_caller("here")
        return self.last(self.act(self.first(x)))


class AsksForLocals(AsksForLocation):
    def forward(self, x: Tensor) -> Tensor:
        self.answer = locals_of_caller("here")
        return self.last(self.act(self.first(x)))


class AsksForFrame(AsksForLocation):
    def forward(self, x: Tensor) -> Tensor:
        self.answer = frame_of_caller("here")
        return self.last(self.act(self.first(x)))


@pytest.mark.parametrize(
    ("kind", "is_rewritten"), [(AsksForLocation, True), (AsksForLocals, False), (AsksForFrame, False)]
)
def test_functions_that_inspect_the_caller(kind: type[nn.Module], is_rewritten: bool) -> None:
    """A rewritten method has the original's file and lines, but other local variables."""
    plain, twin = twins(kind)
    report = ckpt_kernels.convert(twin)
    assert ("MLP" in {entry.by for entry in report.replaced}) == is_rewritten
    x = torch.randn(4, 8, device=DEVICE)
    plain(x)
    twin(x)
    assert twin.answer == plain.answer


class ReplacesBias(nn.Module):
    """A layer that assigns to `bias.data` after the product ran."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.first.bias.data = self.first.bias.data + 3 * torch.arange(8).to(x)
        return self.last(self.act(self.norm(h)))


@pytest.mark.parametrize("recompute", ["output", "all", "layer"])
def test_bias_data_replaced_after_the_product(recompute: str) -> None:
    model = nn.ModuleList([ReplacesBias()]).double()
    other = copy.deepcopy(model)
    ckpt_kernels.convert(other, recompute=recompute)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    expected, found = (torch.autograd.grad(m[0](x).square().sum(), x)[0] for m in (model, other))
    torch.testing.assert_close(found, expected)
