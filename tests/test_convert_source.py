"""What runs is what was written: forwards as people write them, converted, against themselves."""

import copy
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ckpt_kernels
from ckpt_kernels import memory

from .conftest import DEVICE
from .test_convert_composes import close
from .test_convert_rules import WIDTH, by, reason, run, x

INNER = 48


def kept(model: nn.Module, *inputs: Tensor) -> int:
    return memory.saved_bytes(model, *[i.detach().clone().requires_grad_() for i in inputs])


def twins(kind: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = kind().to(DEVICE)
    return model, copy.deepcopy(model)


class Forward(nn.Module):
    """One forward pass, `how`, among those that torch's C code, autograd and Python's own see into."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.act, self.last = nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.losses: list[Tensor] = []
        self.calls = 0

    def mlp(self, h: Tensor) -> Tensor:
        return self.last(self.act(self.first(h)))

    @torch.no_grad()
    def teacher(self, h: Tensor) -> Tensor:
        return self.mlp(h)

    def forward(self, h: Tensor, n: Tensor | None = None) -> Any:
        return getattr(self, self.how)(h)

    def sizes(self, h: Tensor) -> Tensor:
        rows = torch.zeros(h.shape[0], WIDTH, device=h.device) + torch.arange(h.shape[0], device=h.device)[:, None]
        padded = F.pad(self.mlp(h), (h.shape[0], 0))
        return padded[:, h.shape[0] :] + rows + torch.tensor(h.shape[0], device=h.device)

    def checkpointed(self, h: Tensor) -> Tensor:
        return self.norm(h + checkpoint(self.mlp, h, use_reentrant=False))

    def reversed(self, h: Tensor) -> Tensor:
        return self.mlp(Reversed.apply(self.norm(h)))

    def distilled(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.mlp(h)
        return (self.mlp(h) - wanted - self.teacher(h)) ** 2 + self.norm(h)

    def collects(self, h: Tensor) -> Tensor:
        y = self.mlp(h)
        self.losses.append(y.square().mean())
        self.calls += 1
        return y

    def gives_more(self, h: Tensor) -> Any:
        return Answer(value=self.mlp(h), nothing=None, more=[(self.norm(h), None)])

    def asks(self, h: Tensor) -> Tensor:
        q, k = h, h
        y = self.mlp(q)
        if q is k and h.dtype is torch.float32 and None not in [id(y)]:
            y = -y
        return y

    def waits(self, h: Tensor) -> Tensor:
        try:
            y = self.first(h)
            y = self.act(y)
            y = self.last(y)
            if y.sum() > 1e9:
                raise ValueError
        except ValueError:
            y = h
        return y


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Answer(OrderedDict):
    """A mapping with attributes, as libraries return."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__.update(items)


HOWS = ("sizes", "checkpointed", "reversed", "distilled", "collects", "gives_more", "asks", "waits")


@pytest.mark.parametrize("recompute", ("block", "output", "all"))
@pytest.mark.parametrize("how", HOWS)
def test_forwards_do_what_is_written(how: str, recompute: str) -> None:
    model, twin = twins(lambda: Forward(how))
    ckpt_kernels.convert(model, recompute=recompute)
    assert model.calls == 0 and model.losses == []
    for rows in (3, 5):
        results = []
        for each in (model, twin):
            given = x(rows, WIDTH).requires_grad_()
            each.zero_grad()
            answer = each(given)
            outputs = list(memory.tensors_in(answer))
            sum((y * y.detach().cos()).sum() for y in outputs if y.requires_grad).backward()
            grads = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
            results.append((type(answer), dict(enumerate(outputs)) | grads | {"input": given.grad}))
        (kind, ours), (their_kind, theirs) = results
        assert kind is their_kind and ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5)
    assert model.calls == twin.calls and len(model.losses) == len(twin.losses)
    assert all(type(loss) is Tensor for loss in model.losses)


def test_a_checkpoint_in_a_forward_keeps_what_it_kept() -> None:
    model, twin = twins(lambda: Forward("checkpointed"))
    ckpt_kernels.convert(model)
    assert kept(model, x(64, WIDTH)) <= kept(twin, x(64, WIDTH))


def test_conversion_changes_nothing_but_classes() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))
            self.register_buffer("mean", torch.zeros(WIDTH))
            self.seen = 0
            self.settings = {"problem": None}

        def forward(self, h: Tensor) -> Tensor:
            self.seen += 1
            self.settings["problem"] = "some"
            self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
            return (h - self.mean) * self.weight + torch.rand(())

    model = nn.Sequential(Stateful(), nn.BatchNorm1d(WIDTH), nn.GELU(), nn.Linear(WIDTH, 4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = [dict(vars(m)) for m in model.modules()]
    state = torch.get_rng_state()
    ckpt_kernels.convert(model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for old, module in zip(attributes, model.modules(), strict=True):
        now = dict(vars(module))
        assert now.keys() == old.keys() and all(now[key] is old[key] for key in old)
    assert model[0].seen == 0 and model[0].settings == {"problem": None}
    assert by(ckpt_kernels.convert(model), "0") is None


# Nothing of a call is remembered for the next


def test_what_changes_after_conversion_is_seen() -> None:
    model, twin = twins(lambda: nn.TransformerEncoderLayer(WIDTH, 4, INNER, 0.0, batch_first=True))
    ckpt_kernels.convert(model)
    given = x(2, 5, WIDTH)
    torch.testing.assert_close(model(given), twin(given), rtol=1e-4, atol=1e-5)
    for each in (model, twin):
        each.activation = F.silu
    torch.testing.assert_close(model(given), twin(given), rtol=1e-4, atol=1e-5)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Identity()])

        def forward(self, h: Tensor) -> Tensor:
            for layer in self.layers:
                h = layer(h)
            return F.gelu(h)

    model, twin = twins(Stack)
    ckpt_kernels.convert(model)
    torch.manual_seed(1)
    added = nn.Linear(WIDTH, WIDTH).to(DEVICE)
    for each in (model, twin):
        each.layers[1] = nn.Tanh()
        each.layers.append(added)
        for step in range(20):
            each.epoch = step
    torch.testing.assert_close(model(x(3, WIDTH)), twin(x(3, WIDTH)))


def test_patches_after_conversion_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = twins(lambda: Forward("mlp"))
    ckpt_kernels.convert(model)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, h: 2 * F.linear(h, self.weight, self.bias))
    torch.testing.assert_close(model(x(3, WIDTH)), twin(x(3, WIDTH)))
    monkeypatch.setattr(Forward, "mlp", lambda self, h: self.first(h))
    torch.testing.assert_close(model(x(3, WIDTH)), twin(x(3, WIDTH)))
    model.act.register_forward_hook(lambda module, args, output: output * 0)
    monkeypatch.undo()
    torch.testing.assert_close(model(x(3, WIDTH)), model.last.bias.expand(3, -1))


def test_hooks_for_all_modules_see_all_modules() -> None:
    model, _ = twins(lambda: Forward("mlp"))
    ckpt_kernels.convert(model)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    model(x(3, WIDTH))
    handle.remove()
    assert seen == [model.first, model.act, model.last, model]


def test_threads_convert_and_run_by_themselves() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            model = Forward("mlp").to(DEVICE)
            twin = copy.deepcopy(model)
            ckpt_kernels.convert(model)
            for _ in range(5):
                torch.testing.assert_close(model(x(3, WIDTH)), twin(x(3, WIDTH)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_tracebacks_and_debuggers_see_the_lines_that_were_written() -> None:
    model, _ = twins(lambda: Forward("mlp"))
    ckpt_kernels.convert(model)
    ours, theirs = type(model).mlp.__wrapped__.__code__, Forward.mlp.__code__
    assert ours.co_filename == theirs.co_filename and ours.co_firstlineno == theirs.co_firstlineno
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes") as caught:
        model(x(3, WIDTH + 1))
    lines = {entry.lineno + 1 for entry in caught.traceback if entry.path.name == "test_convert_source.py"}
    assert theirs.co_firstlineno + 1 in lines


def test_a_converted_module_makes_ordinary_ones() -> None:
    model, _ = twins(lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.GELU()))
    ckpt_kernels.convert(model)
    assert ckpt_kernels.is_converted(model[0]) and type(model[0]) is not nn.LayerNorm
    made = type(model[0])(WIDTH)
    assert type(made) is nn.LayerNorm and not ckpt_kernels.is_converted(made)


def test_a_class_that_cannot_be_subclassed_is_left_alone_and_said() -> None:
    class Tagged(nn.Module):
        def __init_subclass__(cls, *, tag: str) -> None:
            cls.tag = tag

    class Final(Tagged, tag="final"):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.last = nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)

        def forward(self, h: Tensor) -> Tensor:
            return self.last(self.act(self.first(h)))

    model, twin = twins(Final)
    report = ckpt_kernels.convert(model)
    assert "subclassed" in reason(report, "") and by(report, "act") == "bias_act (gelu)"
    assert type(model) is Final and close(run(model, x(3, WIDTH)), run(twin, x(3, WIDTH)), 1e-5)


def test_what_converts_without_an_error() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), None])
            self.norm = nn.RMSNorm(WIDTH, elementwise_affine=False)

        def forward(self, h: Tensor) -> Tensor:
            return self.norm(self.layers[0](h))

    model, twin = twins(Sparse)
    assert by(ckpt_kernels.convert(model), "norm") == "rms_norm"
    assert close(run(model, x(3, WIDTH)), run(twin, x(3, WIDTH)), 1e-5)
    with torch.device("meta"):
        ckpt_kernels.convert(model)
    assert close(run(model, x(3, WIDTH)), run(twin, x(3, WIDTH)), 1e-5)


# More is found, each with what it keeps


class SwiGLU(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        value, gate = h.chunk(2, dim=-1)
        return F.silu(gate) * value


class StarReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor(0.9)), nn.Parameter(torch.tensor(-0.4))

    def forward(self, h: Tensor) -> Tensor:
        return self.scale * F.relu(h) ** 2 + self.bias


class Written(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h)


def _halves(how: str) -> Callable[[Tensor], Tensor]:
    def gate(h: Tensor) -> Tensor:
        n = h.shape[-1] // 2
        if how == "split":
            a, b = h.split(n, -1)
        elif how == "slices":
            a, b = h[..., :n], h[..., n:]
        elif how == "tensor_split":
            a, b = torch.tensor_split(h, 2, dim=-1)
        elif how == "unbind":
            a, b = h.unflatten(-1, (2, n)).unbind(-2)
        else:
            a, b = h.chunk(2, dim=h.dim() - 1)
        return F.silu(a) * b

    return gate


# Name, what makes it, the most that it may keep at "output" as a fraction of eager's.
FOUND: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "SwiGLU": (SwiGLU, 0.5),
    "nn.GLU": (nn.GLU, 0.67),
    "F.glu": (lambda: Written(F.glu), 0.67),
    "silu written": (lambda: Written(lambda h: h * torch.sigmoid(h)), 0.5),
    "relu().square()": (lambda: Written(lambda h: F.relu(h).square()), 0.5),
    "relu() ** 2": (lambda: Written(lambda h: F.relu(h) ** 2), 0.5),
    "gelu by erf": (lambda: Written(lambda h: h * 0.5 * (1.0 + torch.erf(h / math.sqrt(2.0)))), 0.55),
    "leaky relu": (lambda: nn.LeakyReLU(0.3), 0.5),
    "relu6": (nn.ReLU6, 0.5),
    "softplus with beta": (lambda: nn.Softplus(2.0), 0.5),
    "elu with alpha": (lambda: nn.ELU(0.5), 0.5),
    "prelu": (nn.PReLU, 0.5),
    "star relu": (StarReLU, 0.67),
    "F.normalize": (lambda: Normalized(), 0.51),
    **{f"halves by {how}": (lambda how=how: Written(_halves(how)), 0.5) for how in
       ("split", "slices", "tensor_split", "unbind", "chunk of dim")},
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_pointwise_modules_keep_less(name: str) -> None:
    make, share = FOUND[name]
    out = INNER if any(word in name for word in ("GLU", "glu", "halves")) else 2 * INNER
    model, twin = twins(lambda: nn.Sequential(nn.Linear(WIDTH, 2 * INNER), make(), nn.Linear(out, WIDTH)))
    levels = {}
    for level in ("block", "output", "all"):
        ckpt_kernels.convert(model, recompute=level)
        assert close(run(model, x(64, WIDTH)), run(twin, x(64, WIDTH)), 1e-4)
        levels[level] = kept(model, x(64, WIDTH)) - 64 * WIDTH * 4
    eager = kept(twin, x(64, WIDTH)) - 64 * WIDTH * 4
    assert levels["output"] <= (share + 0.01) * eager
    assert levels["block"] <= 1.01 * eager and levels["all"] <= levels["output"]


def test_a_gate_of_tanh_and_sigmoid_keeps_no_more_at_any_level() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, h: Tensor) -> Tensor:
            return self.out(torch.tanh(self.a(h)) * torch.sigmoid(self.b(h)))

    model, twin = twins(Gate)
    for level in ("block", "output", "all"):
        ckpt_kernels.convert(model, recompute=level)
        assert close(run(model, x(64, WIDTH)), run(twin, x(64, WIDTH)), 1e-4)
        assert kept(model, x(64, WIDTH)) <= kept(twin, x(64, WIDTH))


class ChannelNorm(nn.Module):
    """Over channels, written out; `shape` of its weights."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(shape)), nn.Parameter(torch.rand(shape))

    def forward(self, h: Tensor) -> Tensor:
        mean = h.mean(1, keepdim=True)
        var = (h - mean).pow(2).mean(1, keepdim=True)
        return self.weight * ((h - mean) / torch.sqrt(var + 1e-6)) + self.bias


class ChannelNormOfVectors(ChannelNorm):
    def forward(self, h: Tensor) -> Tensor:
        mean = h.mean(1, keepdim=True)
        var = (h - mean).pow(2).mean(1, keepdim=True)
        return self.weight[:, None, None] * ((h - mean) / torch.sqrt(var + 1e-6)) + self.bias[:, None, None]


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(2 * INNER))

    def forward(self, h: Tensor) -> Tensor:
        return F.normalize(h, dim=-1) * math.sqrt(2 * INNER) * self.gamma


class NormalizedMaps(nn.Module):
    """As the norms of Wan's autoencoder are written."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.gamma, self.bias = width**0.5, nn.Parameter(torch.rand(width, 1, 1) + 0.5), 0.0

    def forward(self, h: Tensor) -> Tensor:
        wide = h.dtype in (torch.float16, torch.bfloat16) or any(kind in str(h.dtype) for kind in ("float8_",))
        return F.normalize(h.float() if wide else h, dim=1).to(h.dtype) * self.scale * self.gamma + self.bias


class InFloat32(nn.LayerNorm):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.float()).to(h.dtype)


class WithoutParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.normalized_shape, self.eps = (WIDTH,), 1e-6

    def forward(self, h: Tensor) -> Tensor:
        return F.layer_norm(h.float(), self.normalized_shape, None, None, self.eps).to(h.dtype)


@pytest.mark.parametrize(
    ("make", "found", "shape"),
    (
        (lambda: ChannelNormOfVectors((WIDTH,)), "layer_norm (channels first)", (2, WIDTH, 5, 6)),
        (lambda: ChannelNorm((WIDTH, 1, 1)), "layer_norm (channels first)", (2, WIDTH, 5, 6)),
        (lambda: ChannelNorm((1, WIDTH, 1, 1)), "layer_norm (channels first)", (2, WIDTH, 5, 6)),
        (lambda: InFloat32(WIDTH), "layer_norm", (4, 7, WIDTH)),
        (WithoutParameters, "layer_norm", (4, 7, WIDTH)),
        (lambda: NormalizedMaps(WIDTH), "rms_norm (channels first)", (2, WIDTH, 5, 6)),
    ),
    ids=("vector", "(C, 1, 1)", "(1, C, 1, 1)", "super().forward", "without parameters", "F.normalize"),
)
def test_norms_as_people_write_them(make: Callable[[], nn.Module], found: str, shape: tuple[int, ...]) -> None:
    model, twin = twins(make)
    assert by(ckpt_kernels.convert(model), "") == found
    assert close(run(model, x(*shape)), run(twin, x(*shape)), 1e-4)
    last = x(*shape)
    if len(shape) == 4:
        last = last.to(memory_format=torch.channels_last)
    assert model(x(*shape)).stride() == twin(x(*shape)).stride() and model(last).stride() == twin(last).stride()
    narrow = x(*shape, dtype=torch.bfloat16)
    for each in (model, twin):
        # Which torch's own layer norm does not take beside an input in float32.
        each.to(torch.float32 if isinstance(each, InFloat32) else torch.bfloat16)
    torch.testing.assert_close(model(narrow).float(), twin(narrow).float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-9, 1e4])
def test_points_of_nothing_are_normalized_as_they_were(scale: float) -> None:
    model, twin = twins(lambda: NormalizedMaps(WIDTH))
    ckpt_kernels.convert(model)
    given = x(2, WIDTH, 3, 4) * torch.where(torch.arange(4) > 1, 1.0, scale)
    outputs, gradients = [], []
    for each in (model, twin):
        leaf = given.clone().requires_grad_()
        outputs.append(each(leaf))
        gradients.append(torch.autograd.grad((outputs[-1] * x(2, WIDTH, 3, 4)).sum(), leaf)[0])
    torch.testing.assert_close(*outputs)
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[1].abs().max()


def test_a_residual_written_in_place_after_a_norm_in_16_bits() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(WIDTH)
            self.ff = nn.Linear(WIDTH, WIDTH)

        def forward(self, h: Tensor) -> Tensor:
            h = h + 1
            h += self.ff(self.norm(h))
            return h

    model, twin = twins(Block)
    given = x(8, WIDTH, dtype=torch.bfloat16)
    ckpt_kernels.convert(model.to(torch.bfloat16))
    assert close(run(model, given), run(twin.to(torch.bfloat16), given), 0.02)


def test_a_copy_of_a_norms_output_is_let_go_of() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

        def forward(self, h: Tensor) -> Tensor:
            h = self.norm(h)
            return self.attention(h, h, h, need_weights=False)[0]

    model, twin = twins(Attends)
    ckpt_kernels.convert(model)
    assert close(run(model, x(2, 16, WIDTH)), run(twin, x(2, 16, WIDTH)), 1e-4)
    saved = kept(twin, x(2, 16, WIDTH)) - kept(model, x(2, 16, WIDTH))
    assert saved >= 2 * 16 * WIDTH * 4


def test_activations_keep_the_strides_of_maps() -> None:
    for make in (nn.GELU, nn.SiLU, lambda: Written(F.gelu)):
        model, twin = twins(make)
        ckpt_kernels.convert(model)
        maps = x(2, 8, 5, 6).to(memory_format=torch.channels_last)
        assert model(maps).stride() == twin(maps).stride() == maps.stride()
        rows = x(2, 5, 8).transpose(1, 2)
        assert model(rows).transpose(1, 2).view(2, 40).shape == (2, 40)


# The report


def test_the_report_is_true() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH), nn.Dropout(0.0))
    report = ckpt_kernels.convert(model, inputs=x(8, WIDTH))
    before, after = report.kept
    assert before == after and by(report, "3") is None
    assert report.as_dict()["kept"] == report.kept and report.backend in str(report)
    report = ckpt_kernels.convert(
        nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, 4)), inputs=x(8, WIDTH)
    )
    assert (
        report.kept[1] < report.kept[0] and f"{report.kept[1]:,}" in str(report) and "<table>" in report._repr_html_()
    )


def test_what_looks_like_something_is_said() -> None:
    class MyGELU(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h * torch.rand_like(h)

    class OddNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, h: Tensor) -> Tensor:
            return h / h.abs().sum(-1, keepdim=True) * self.weight

    report = ckpt_kernels.convert(nn.Sequential(MyGELU(), OddNorm()))
    assert "rand_like" in reason(report, "0") and "abs" in reason(report, "1")
    # No name of an exception of our own.
    assert not any(word in str(report) for word in ("Error", "Traceback", "NotTried"))
