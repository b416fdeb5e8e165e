"""Logits that are computed on the first access: losses in chunks, and other uses of logits."""

import copy
import inspect
import pathlib
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

import ckpt_kernels
from ckpt_kernels.logits import Logits
from ckpt_kernels.memory import peak_bytes

from .conftest import DEVICE

CLASSES, COLUMNS = 500, 8


class Model(nn.Module):
    """A trunk, a head, and a function `use` of the logits."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], bias: bool = False) -> None:
        super().__init__()
        self.trunk = nn.Linear(COLUMNS, COLUMNS)
        self.head = nn.Linear(COLUMNS, CLASSES, bias=bias)
        self.use = use

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.use(self.head(self.trunk(input)), target)


def causal(logits: Tensor, target: Tensor) -> Tensor:
    shifted = logits[..., :-1, :].contiguous().float()
    return functional.cross_entropy(shifted.view(-1, CLASSES), target[..., 1:].reshape(-1))


def capped(logits: Tensor, target: Tensor) -> Tensor:
    logits = torch.tanh(logits / 3.0) * 3.0
    return nn.CrossEntropyLoss(label_smoothing=0.1)(logits.flatten(0, 1).float(), target.flatten())


def scaled(logits: Tensor, target: Tensor) -> Tensor:
    # A fifth of the rows is ignored.
    kept = target[:, :-1].reshape(-1).clamp_min(CLASSES // 5)
    return functional.cross_entropy((0.25 * logits)[:, 1:].reshape(-1, CLASSES), kept, ignore_index=CLASSES // 5)


def each_row(logits: Tensor, target: Tensor) -> Tensor:
    losses = functional.cross_entropy(logits.view(-1, CLASSES), target.view(-1), reduction="none")
    return (losses * torch.arange(losses.numel(), device=DEVICE)).mean()


# Losses that read logits in chunks.
CHUNKED = {"causal": causal, "capped": capped, "scaled": scaled, "each row": each_row}


class Shared(torch.autograd.Function):
    """A user's function that saves its operand."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.exp().mean()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return grad * logits.exp() / logits.numel()


def written_to(logits: Tensor, target: Tensor) -> Tensor:
    flat, copied = logits.view(-1, CLASSES), logits.to(torch.float64)
    logits[..., :3] = 1.0
    return functional.cross_entropy(flat, target.view(-1)) + copied.mean().float() + logits.square().mean()


def weighted(logits: Tensor, target: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 1, CLASSES, device=DEVICE)
    return functional.cross_entropy(logits.transpose(1, 2), target, weight=weight)


def probable(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), functional.one_hot(target.flatten(), CLASSES).float())


def two_losses(logits: Tensor, target: Tensor) -> Tensor:
    return causal(logits, target) + 1e-4 * logits.logsumexp(-1).square().mean()


# Uses that compute all logits at once.
WHOLE = {
    "function": lambda logits, target: Shared.apply(logits),
    "function of a view": lambda logits, target: Shared.apply((0.5 * logits.float()).view(-1, CLASSES)),
    "written to": written_to,
    "weighted": weighted,
    "probabilities": probable,
    "two losses": two_losses,
    "columns": lambda logits, target: logits[..., 3].sum() + logits[0, 1, :5].mean() + logits[0, 1, 2, ...],
    "other columns": lambda logits, target: logits.view(8, -1, CLASSES // 5)[..., 0].sum(),
    "mask": lambda logits, target: logits[target > 9].square().mean(),
    "softmax": lambda logits, target: (logits.softmax(-1).amax(-1, keepdim=True) * 2 - logits).mean(),
    "stack": lambda logits, target: torch.cat([logits, logits * 2]).square().mean(),
}


def inputs(length: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    input = torch.randn(8, length, COLUMNS, generator=generator)
    target = torch.randint(CLASSES, (8, length), generator=generator)
    return input.to(DEVICE), target.to(DEVICE)


def step(model: nn.Module, *given: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = model(*given)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def pair(use: Callable[[Tensor, Tensor], Tensor], **options: bool) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Model(use, **options).to(DEVICE)
    twin = copy.deepcopy(model)
    ckpt_kernels.convert(twin, logits="head")
    return model, twin


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("use", [*CHUNKED.values(), *WHOLE.values()], ids=[*CHUNKED, *WHOLE])
def test_losses_and_gradients_equal_eager(use: Callable[[Tensor, Tensor], Tensor], bias: bool) -> None:
    model, twin = pair(use, bias=bias)
    for mine, theirs in zip(step(twin, *inputs()), step(model, *inputs()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use", CHUNKED.values(), ids=CHUNKED)
def test_a_loss_never_computes_all_logits_at_once(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    given = inputs(400)  # 3,200 rows in chunks of 256
    eager, chunked = (peak_bytes(lambda m=model: step(m, *given), DEVICE) for model in pair(use))
    assert chunked < 0.5 * eager
    assert chunked < 3200 * CLASSES * 4


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_causal_model_takes_at_most_half_the_memory(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shared = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=4000)
    kind = transformers.CONFIG_MAPPING[name]
    special = dict(head_dim=16, final_logit_softcapping=4.0) if name == "gemma2" else {}
    config = kind(num_key_value_heads=2, **shared, **special)
    model = transformers.AutoModelForCausalLM.from_config(config).to(DEVICE)
    twin = copy.deepcopy(model)
    ckpt_kernels.convert(model)
    report = ckpt_kernels.convert(twin, logits="lm_head")
    assert ("lm_head", "Linear") in [(entry.name, entry.kind) for entry in report.replaced]
    ids = torch.randint(4000, (2, 512), device=DEVICE)
    labels = ids.where(torch.rand(ids.shape, device=DEVICE) > 0.2, -100)

    def run(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        output = model(input_ids=ids, labels=labels)
        output.loss.backward()
        return [output.loss.detach(), *(p.grad for p in model.parameters())]

    for mine, theirs in zip(run(twin), run(model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    peaks = [peak_bytes(lambda m=module: run(m), DEVICE) for module in (model, twin)]
    assert peaks[1] <= 0.5 * peaks[0]
    torch.testing.assert_close(twin(ids).logits + 0, model(ids).logits, rtol=1e-4, atol=1e-5)


def logits(**options: bool) -> tuple[nn.Module, Logits, Tensor]:
    model, twin = pair(lambda logits, target: logits, **options)
    return twin, twin(*inputs()), model(*inputs())


def test_logits_behave_like_a_tensor() -> None:
    _, lazy, real = logits()
    assert isinstance(lazy, Tensor) and type(lazy) is Logits
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "layout"):
        assert getattr(lazy, name) == getattr(real, name), name
    assert lazy.stride() == real.stride() and len({lazy, lazy}) == 1
    assert lazy._made.value is None
    assert torch.equal(lazy.to(torch.int64), real.to(torch.int64))
    assert torch.equal(lazy.view(torch.int32), real.view(torch.int32))
    assert torch.equal(lazy.detach().cpu(), real.cpu())
    assert repr(lazy.detach()) == repr(real.detach())
    assert torch.equal(pickle.loads(pickle.dumps(lazy.detach())), real.detach())
    assert (lazy.detach().cpu().numpy() == real.detach().cpu().numpy()).all()


def test_errors_are_torchs() -> None:
    _, lazy, real = logits()
    double = nn.Linear(2, 3).double()
    ckpt_kernels.convert(double, logits="")
    with pytest.raises(RuntimeError, match="dtype"):
        double(torch.ones(2, 2))
    for wrong in (lambda t: t.view(7, -1), lambda t: t[99], lambda t: t[:, :, :, 0], lambda t: t[:, ::2].view(-1)):
        with pytest.raises((RuntimeError, IndexError)) as theirs:
            wrong(real)
        with pytest.raises(type(theirs.value)):
            wrong(lazy)


@pytest.mark.parametrize("index", [0, -1, (0, 1), ..., (..., slice(None)), (slice(1, 4), -1), (None, 0), (0, ..., 2)])
def test_slices_equal_torchs(index: object) -> None:
    _, lazy, real = logits()
    assert lazy[index].shape == real[index].shape
    assert torch.equal(lazy[index] + 0, real[index] + 0)


def write(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.add_(1)


def release(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(0)


@pytest.mark.parametrize("read", [Tensor.sum, lambda lazy: causal(lazy, inputs()[1])], ids=["look", "loss"])
@pytest.mark.parametrize("change", [write, release])
@pytest.mark.parametrize("operand", ["input", "weight", "bias"])
def test_an_access_after_a_change_of_an_operand_is_an_error(
    operand: str, change: Callable[[Tensor], None], read: Callable[[Logits], Tensor]
) -> None:
    _, model = pair(causal, bias=True)
    input = inputs()[0]
    lazy = model.head(input)
    change({"input": input, "weight": model.head.weight, "bias": model.head.bias}[operand])
    with pytest.raises(RuntimeError, match="after what they are made of was changed"):
        read(lazy)


def test_the_guide_lists_the_errors_of_the_docstring() -> None:
    listed = inspect.getdoc(Logits).partition("RuntimeError: ")[2].partition(".\n")[0]
    guide = " ".join((pathlib.Path(__file__).parent.parent / "docs" / "long_sequences.md").read_text().split())
    errors = " ".join(listed.split()).split("; ")
    assert len(errors) == 4
    for error in errors:
        assert f"- {error}" in guide


def test_gradients_of_uncomputed_logits_are_an_error() -> None:
    model, lazy, _ = logits()
    loss = causal(lazy, inputs()[1])
    with pytest.raises(RuntimeError, match="they have no gradient"):
        lazy.retain_grad()
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(loss, lazy)
    model, lazy, real = logits()
    for given in (lazy, real):
        given.retain_grad()
        causal(given, inputs()[1]).backward()
    torch.testing.assert_close(lazy.grad, real.grad)


def test_observed_calls_return_a_plain_tensor() -> None:
    model, lazy, real = logits(bias=True)
    seen: list[type] = []
    handle = model.head.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    assert type(model(*inputs())) is Tensor and seen == [Tensor]
    handle.remove()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert type(compiled(*inputs())) is Tensor
    for_all = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert type(model(*inputs())) is Tensor
    for_all.remove()
    with torch.inference_mode():
        made = model.trunk(inputs()[0])
        assert type(model(*inputs())) is Tensor
    model.head.weight.requires_grad_(False)
    assert type(model.head(made)) is Tensor
    assert type(model(*inputs())) is Logits
    nn.utils.parametrize.register_parametrization(model.head, "bias", nn.Softplus())
    assert type(model(*inputs())) is Tensor


def test_recomputed_losses_run_under_the_same_autocast() -> None:
    gradients = []
    for model in pair(each_row):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = model(*inputs())
        loss.backward()
        gradients.append(model.head.weight.grad)
    # Eager torch's gradients are rounded to bfloat16.
    rounding = torch.finfo(torch.bfloat16).eps / 2 * gradients[0].abs().max().item()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=rounding)


def test_without_gradients_and_under_autocast() -> None:
    model, twin = pair(causal)
    with torch.no_grad():
        torch.testing.assert_close(twin(*inputs()), model(*inputs()))
    before, expected = (module.head(inputs()[0]) for module in (twin, model))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        torch.testing.assert_close(twin(*inputs()), model(*inputs()), rtol=1e-3, atol=1e-3)
        for late in map(twin.head, (inputs()[0], inputs()[0].bfloat16())):
            assert type(late) is Logits and late.dtype == torch.bfloat16
        # Logits from before autocast are computed without autocast.
        torch.testing.assert_close(causal(before, inputs()[1]), causal(expected, inputs()[1]))
        torch.testing.assert_close(before.detach(), expected.detach())
    for mine, theirs in zip(step(twin, *inputs()), step(model, *inputs()), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_copies_and_revert() -> None:
    model, twin = pair(causal)
    for copied in (copy.deepcopy(twin), pickle.loads(pickle.dumps(pair(causal)[1]))):
        torch.testing.assert_close(copied(*inputs()), model(*inputs()))
        assert type(copied.head(inputs()[0])) is Logits
    ckpt_kernels.revert(twin)
    assert type(twin.head) is nn.Linear and type(twin.head(inputs()[0])) is Tensor


@pytest.mark.parametrize("name", ["nothing", "trunk*x", ""])
def test_names_of_no_linear_layer_are_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected the name of a torch\.nn\.Linear"):
        ckpt_kernels.convert(Model(causal), logits=name)


def test_a_parametrized_head_stays() -> None:
    torch.manual_seed(0)
    model = Model(causal).to(DEVICE)
    nn.utils.parametrizations.weight_norm(model.head, "weight", dim=0)
    expected = model(*inputs())
    report = ckpt_kernels.convert(model, logits="head")
    assert {entry.name: entry.reason for entry in report.left_alone}["head"] == "its parameters are parametrized"
    nn.utils.parametrize.remove_parametrizations(model.head, "weight")
    torch.testing.assert_close(model(*inputs()), expected)
