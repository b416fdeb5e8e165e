"""Every rule of provenance once, and graphs that no rule may misread."""

import contextlib

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ckpt_kernels import functional as F
from ckpt_kernels import recompute
from ckpt_kernels.recompute import nodes
from ckpt_kernels.recompute.rules import CONVOLUTIONS, PRODUCTS, RULES_IN_LAYERS

from .conftest import DEVICE
from .discarded_outputs import (
    ROWS,
    STATISTICS,
    UNIT,
    WIDTH,
    Parameters,
    assert_same_bits,
    assert_same_outcome,
    assert_unchanged,
    kept_bytes,
    normed,
    random_tensor,
)


@pytest.fixture
def x() -> Tensor:
    return random_tensor(ROWS, WIDTH, seed=1).requires_grad_()


# An expression of a block's output n for each rule, by the name of the autograd node.
three = lambda n: n.view(4, 16, WIDTH)  # noqa: E731
MADE = {
    "AbsBackward0": lambda n, p: n.abs(),
    "AvgPool2DBackward0": lambda n, p: TF.avg_pool2d(n.view(1, 1, ROWS, WIDTH), 3, 1, 1).view(ROWS, WIDTH),
    "CeluBackward0": lambda n, p: TF.celu(n, 0.7),
    "ClampBackward1": lambda n, p: n.clamp(-0.4, 0.3),
    "CosBackward0": lambda n, p: n.cos(),
    "DivBackward0": lambda n, p: n / p["r"],
    "EluBackward0": lambda n, p: TF.elu(n, 0.5),
    "ErfBackward0": lambda n, p: n.erf(),
    "GeluBackward0": lambda n, p: TF.gelu(n, approximate="tanh"),
    "GluBackward0": lambda n, p: TF.glu(torch.cat((n, n), -1)),
    "HardsigmoidBackward0": lambda n, p: TF.hardsigmoid(n),
    "HardswishBackward0": lambda n, p: TF.hardswish(n),
    "HardtanhBackward0": lambda n, p: TF.hardtanh(n, -0.4, 0.3),
    "LeakyReluBackward0": lambda n, p: TF.leaky_relu(n, 0.2),
    "LogBackward0": lambda n, p: n.sigmoid().log(),
    "LogSigmoidBackward0": lambda n, p: TF.logsigmoid(n),
    "MaxPool2DWithIndicesBackward0": lambda n, p: TF.max_pool2d(n.view(1, 1, ROWS, WIDTH), 3, 1, 1).view(ROWS, WIDTH),
    "MishBackward0": lambda n, p: TF.mish(n),
    "MulBackward0": lambda n, p: n * n.sin(),
    "PowBackward0": lambda n, p: n**3,
    "PreluKernelBackward0": lambda n, p: TF.prelu(n, p["one"]),
    **{
        f"{name}Pad{len(sides) // 2}DBackward0": lambda n, p, shape=shape, sides=sides, mode=mode: TF.pad(
            n.view(shape), sides, mode
        ).reshape(-1, WIDTH)
        for name, mode in (("Reflection", "reflect"), ("Replication", "replicate"))
        for shape, sides in (
            ((1, ROWS, WIDTH), (WIDTH // 2, WIDTH // 2)),
            ((1, 1, ROWS, WIDTH), (0, 0, 2, 1)),
            ((1, 1, 4, ROWS // 4, WIDTH), (0, 0, 0, 0, 1, 2)),
        )
    },
    "SiluBackward0": lambda n, p: TF.silu(n),
    "SinBackward0": lambda n, p: n.sin(),
    "CeluBackward1": lambda n, p: TF.celu(n, 0.7, inplace=True),
    "EluBackward1": lambda n, p: TF.elu(n, 0.5, inplace=True),
    "LeakyReluBackward1": lambda n, p: TF.leaky_relu(n, 0.2, inplace=True),
    "SoftplusBackward0": lambda n, p: TF.softplus(n, 2.0, 3.0),
    "ExpBackward0": lambda n, p: n.exp(),
    "ReciprocalBackward0": lambda n, p: n.reciprocal(),
    "ReluBackward0": lambda n, p: n.relu(),
    "RsqrtBackward0": lambda n, p: n.sigmoid().rsqrt(),
    "SigmoidBackward0": lambda n, p: n.sigmoid(),
    "SqrtBackward0": lambda n, p: n.sigmoid().sqrt(),
    "TanhBackward0": lambda n, p: n.tanh(),
    "AddBackward0": lambda n, p: torch.add(n, n, alpha=3),
    "AddcmulBackward0": lambda n, p: torch.addcmul(n, n, n, value=0.5),
    "CatBackward0": lambda n, p: torch.cat((n, n), -1)[..., :WIDTH],
    "CloneBackward0": lambda n, p: n.t().contiguous().view(-1, WIDTH),
    "NegBackward0": lambda n, p: -n,
    "SubBackward0": lambda n, p: torch.sub(n, n, alpha=3),
    "ToCopyBackward0": lambda n, p: n.double().sin().float(),
    "UpsampleBilinear2DBackward0": lambda n, p: TF.interpolate(
        n.view(1, 1, ROWS, WIDTH), scale_factor=(2, 1), mode="bilinear"
    ).view(-1, WIDTH),
    "UpsampleNearest2DBackward0": lambda n, p: TF.interpolate(n.view(1, 1, ROWS, WIDTH), size=(3, WIDTH)).view(
        3, WIDTH
    ),
    "SqueezeBackward0": lambda n, p: -(n.view(1, ROWS, WIDTH).squeeze()),
    "SqueezeBackward1": lambda n, p: -(n.view(1, ROWS, WIDTH).squeeze(-3)),
    "SqueezeBackward2": lambda n, p: -(n.view(1, ROWS, 1, WIDTH).squeeze((0, -2))),
    "UnsqueezeBackward0": lambda n, p: (-n.unsqueeze(-2)).view(-1, WIDTH),
    "ViewBackward0": lambda n, p: (-three(n)).view(-1, WIDTH),
    "ExpandBackward0": lambda n, p: n.view(1, ROWS, WIDTH).expand(2, ROWS, WIDTH).neg().view(-1, WIDTH),
    "PermuteBackward0": lambda n, p: three(n).permute(-2, 0, -1).neg().permute(1, 0, 2),
    "SelectBackward0": lambda n, p: n.view(2, -1, WIDTH).select(0, -1).neg(),
    "SliceBackward0": lambda n, p: n[1:-1:2, 4:].neg() @ p["a"][4:],
    "IndexBackward0": lambda n, p: n[:, torch.arange(WIDTH, device=DEVICE) // 2],
    "IndexSelectBackward0": lambda n, p: n.index_select(1, torch.arange(n.shape[1], device=DEVICE) // 2),
    "SplitBackward0": lambda n, p: -n.split(WIDTH // 2, -1)[-1] @ p["a"][: WIDTH // 2],
    "SplitWithSizesBackward0": lambda n, p: -n.split((4, WIDTH - 4), -1)[1] @ p["a"][4:],
    "UnbindBackward0": lambda n, p: -n.view(2, -1, WIDTH).unbind(-3)[1],
    "TBackward0": lambda n, p: n.t().neg().t(),
    "TransposeBackward0": lambda n, p: three(n).transpose(-2, -3).neg().transpose(0, 1),
    "UnsafeViewBackward0": lambda n, p: three(n).transpose(0, 1).reshape(-1, WIDTH),
    "AddmmBackward0": lambda n, p: F.bias_act(torch.addmm(p["bias"], n, p["a"], beta=0.5, alpha=2), activation="gelu"),
    "MmBackward0": lambda n, p: F.bias_act(n @ p["a"], activation="gelu"),
    "GroupedMmBackward0": lambda n, p: F.bias_act(grouped(n, p["a"]), activation="gelu"),
}


def grouped(n: Tensor, weight: Tensor) -> Tensor:
    """A grouped product: the first rows with one weight, the others with another."""
    ends = torch.tensor((5, ROWS), dtype=torch.int32, device=DEVICE)
    return torch._grouped_mm(n, torch.stack((weight, -weight)), offs=ends)


@pytest.mark.parametrize("name", MADE)
def test_every_rule_discards_an_output(name: str, x: Tensor) -> None:
    p = Parameters()
    p["r"] = random_tensor(ROWS, WIDTH, seed=5) + 3
    p["one"] = torch.full((1,), 0.3, device=DEVICE, requires_grad=True)

    def call() -> Tensor:
        made = MADE[name](normed(x), p)
        nodes, names = [made.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None:
                names.add(node.name())
                nodes += [n for n, _ in node.next_functions]
        assert name in names, names
        return TF.linear(made, p["c"])

    call()
    products = name in PRODUCTS
    assert kept_bytes(recompute.discard_outputs(products=products)(call)) < kept_bytes(call)
    assert_unchanged(call, [x, p["c"]], products=products)


def test_every_rule_is_tested() -> None:
    """test_convert_layers tests convolutions, which run again only in layers."""
    others = {"AliasBackward0", "ReshapeAliasBackward0", *CONVOLUTIONS}
    assert RULES_IN_LAYERS.keys() - MADE.keys() == others


@pytest.mark.parametrize("late", [False, True], ids=["before it is read", "after"])
def test_a_write_to_an_index_is_torchs_error(late: bool, x: Tensor) -> None:
    """torch's own gradient needs the index too."""
    p = Parameters()

    def call() -> Tensor:
        index = torch.arange(ROWS, device=DEVICE)
        made = normed(x)[index]
        if not late:
            index.zero_()
        y = TF.linear(made, p["a"])
        return y if not late else y + 0 * index.zero_().sum()

    for function in (call, recompute.discard_outputs()(call)):
        with pytest.raises(RuntimeError, match=r"modified by an in-?place operation"):
            torch.autograd.grad(function().sum(), [x])


def test_an_index_that_is_written_to_before_the_read_of_the_rows(x: Tensor) -> None:
    """The gradient of the reader's weight does not need the index."""
    p = Parameters()

    def call() -> Tensor:
        index = torch.arange(ROWS, device=DEVICE)
        made = normed(x)[index]
        index.zero_()
        return TF.linear(made, p["a"])

    assert_same_outcome(call, [p["a"]])


def test_an_index_within_a_checkpoint_is_not_read_outside(x: Tensor) -> None:
    """The index is that of a context within; to read the index would run the checkpoint again."""
    p, calls = Parameters(), []

    def part(h: Tensor) -> Tensor:
        calls.append(h)
        with recompute.discard_outputs():
            return h[torch.arange(ROWS, device=DEVICE)]

    with recompute.discard_outputs():
        y = TF.linear(checkpoint(part, x.sigmoid(), use_reentrant=False), p["a"])
    torch.autograd.grad(y.sum(), [p["a"]])
    assert len(calls) == 1


def test_a_watch_is_that_of_one_output(x: Tensor) -> None:
    _, second = x.sigmoid().chunk(2)
    nodes.watch(second)
    assert nodes.is_watched(second.grad_fn, 1) and not nodes.is_watched(second.grad_fn, 0)


def test_readers_of_both_outputs_of_a_block(x: Tensor) -> None:
    p = Parameters()

    def call() -> Tensor:
        n, total = F.add_layer_norm(x * 1, x.sin(), (WIDTH,))
        return TF.linear(total * 3, p["a"]) + TF.linear(n.relu(), p["b"]) + TF.linear(n * 2, p["c"])

    call()
    assert_unchanged(call, [x, *p.values()])


def test_a_block_of_another_context(x: Tensor) -> None:
    p = Parameters()

    def part(h: Tensor) -> Tensor:
        with recompute.discard_outputs():
            return TF.linear(h * 2, p["a"]).cumsum(-1).sin()

    with recompute.discard_outputs():
        h = normed(x)
        y = checkpoint(part, h, use_reentrant=False)
    torch.autograd.grad(h.sum(), [x])
    expected = torch.autograd.grad(part(h.detach()).sum(), [p["a"]])
    del h
    assert_same_bits(torch.autograd.grad(y.sum(), [p["a"]]), expected)


def test_a_saved_operand_that_is_written_to(x: Tensor) -> None:
    """A node shows the operand, which is written to before the traced tensor is read."""
    p = Parameters()

    def call() -> Tensor:
        h = x * 1
        y = h * x.sin()
        with torch.no_grad():
            h.mul_(1.5)
        return TF.linear(y * h, p["a"])

    assert_same_outcome(call, [p["a"]])


def test_parameters_that_are_no_vectors_are_not_copied(x: Tensor) -> None:
    p = Parameters()
    call = lambda: TF.linear(normed(x[:WIDTH]) + p["a"] + p["b"] + p["d"], p["c"])  # noqa: E731
    assert kept_bytes(recompute.discard_outputs(temporaries=True)(call)) <= kept_bytes(call)


def test_a_number_made_outside_and_written_to(x: Tensor) -> None:
    p = Parameters()

    def call(around) -> Tensor:
        n = normed(x)
        scale = torch.tensor(2.0)
        h = (x * 1).sin() * scale
        scale.mul_(3)
        with around:
            return TF.linear(h, p["a"]) + TF.linear(h * n.sin(), p["b"])

    sources = [p["a"]]
    expected = torch.autograd.grad(call(contextlib.nullcontext()).sum(), sources)
    assert_same_bits(torch.autograd.grad(call(recompute.discard_outputs(temporaries=True)).sum(), sources), expected)


def test_users_hooks_that_pack_indices(x: Tensor) -> None:
    p = Parameters()
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor.detach().clone())
        return torch.tensor(len(tensors) - 1)

    def call() -> Tensor:
        n = normed(x)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: tensors[int(index)]):
            h = n * x.detach()
        return TF.linear(h * 2, p["a"])

    call()
    assert_unchanged(call, [x, *p.values()], temporaries=True)


def test_conjugate_views(x: Tensor) -> None:
    def call() -> Tensor:
        h = x * 1
        c = torch.complex(h, h.sin())
        z = c * torch.complex(h, h)
        return torch.view_as_real(z.conj() * z.sin()).sum(-1) + torch.view_as_real(z.conj().sin()).sum(-1)

    assert_unchanged(call, [x])
    assert_unchanged(call, [x], temporaries=True)


def test_recipes_have_at_most_most_steps(x: Tensor) -> None:
    from ckpt_kernels.recompute import provenance

    p = Parameters()

    def call(steps: int) -> Tensor:
        h = normed(x)
        for _ in range(steps):
            h = -h
        return TF.linear(h, p["c"])

    for steps, kept in ((provenance.MOST_STEPS, UNIT), (provenance.MOST_STEPS + 1, 2 * UNIT)):
        fn = recompute.discard_outputs(temporaries=True)(lambda steps=steps: call(steps))
        assert kept_bytes(fn) == kept + STATISTICS


@pytest.mark.parametrize("make", [normed, lambda h: TF.silu(h * 1)], ids=["block", "traced"])
def test_views_of_another_dtype(make, x: Tensor) -> None:
    def call() -> Tensor:
        c = torch.view_as_complex(make(x).view(-1, 2))
        return torch.view_as_real(c * c.sin())

    assert_unchanged(call, [x])
    assert_unchanged(call, [x], temporaries=True)


def test_results_read_before_and_after_a_write(x: Tensor) -> None:
    """Two readers of a result save different values."""
    p = Parameters()

    def call() -> Tensor:
        h = x * 1
        s = h.sigmoid()
        first = TF.linear(s, p["a"])
        y = h * s
        with torch.no_grad():
            s.mul_(2)
        return first.sum() + TF.linear(s, p["b"]).sum() + TF.linear(y, p["c"]).sum()

    for source in "abc":
        assert_same_outcome(call, [p[source]])


def test_a_recipe_of_an_input_without_a_gradient(x: Tensor) -> None:
    p = Parameters()

    def call() -> Tensor:
        n = F.bias_act(x.detach() * 1, p["bias"], activation="relu")
        return TF.linear(n * 2, p["a"]) + TF.linear(TF.relu(n), p["b"])

    call()
    assert_unchanged(call, [*p.values()], temporaries=True)
