"""The text at the start of every generated program: hand-written modules, and objects that forwards read and write."""

import collections
import contextlib
import dataclasses
import functools
import math
import random
import types
import typing

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Objects that a forward may read and write. Each twin has its own.
CONFIG = types.SimpleNamespace(scale=1.0, act="silu", eps=1e-5, deep=True)
ACTS = {"silu": F.silu, "gelu": F.gelu, "relu": torch.relu, "tanh": torch.tanh}
STATE: dict = {}
LOG: list = []
HANDLES: list = []
TOTAL = 0
USED = (math, random, numpy, contextlib, checkpoint)


class Tagged(Tensor):
    """A tensor subclass, which results inherit."""


class Pair(typing.NamedTuple):
    hidden: Tensor
    other: object = None


@dataclasses.dataclass
class Data:
    hidden: Tensor
    others: list = dataclasses.field(default_factory=list)


class ModelOutput(collections.OrderedDict):
    def __getattr__(self, name: str) -> object:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class GradReverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.factor * grad, None


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.clamp(x, -1, 1)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad + 0.1 * x


class RMSNormUp(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim))
        self.eps = eps

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        return self.weight * x.to(dtype)


class RMSNormPlus(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.scale = nn.Parameter(0.1 * torch.randn(dim))
        self.eps = eps

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        out = self._norm(x.float())
        out = out * (1.0 + self.scale.float())
        return out.type_as(x)


class RMSNormPlain(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.g = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        rms = torch.sqrt(torch.mean(x * x, dim=-1, keepdim=True) + 1e-5)
        return x / rms * self.g


class ErfGELU(nn.Module):
    def forward(self, x):
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class NewGELU(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Swish(nn.Module):
    calls = 0

    def forward(self, x):
        Swish.calls += 1
        return x * x.sigmoid()


class ReLUSquared(nn.Module):
    def forward(self, x):
        return torch.square(F.relu(x))


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden, bias=False):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=bias)
        self.w2 = nn.Linear(hidden, dim, bias=bias)
        self.w3 = nn.Linear(dim, hidden, bias=bias)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class PackedMLP(nn.Module):
    """A gated MLP with one product, which is split into halves in several ways."""

    def __init__(self, dim, hidden, how="chunk", act=None):
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden)
        self.act = nn.GELU() if act is None else act
        self.down = nn.Linear(hidden, dim)
        self.how = how
        self.hidden = hidden

    def forward(self, x):
        x = self.up(x)
        if self.how == "chunk":
            gate, value = x.chunk(2, dim=-1)
        elif self.how == "split":
            value, gate = x.split(self.hidden, -1)
        elif self.how == "slices":
            gate, value = x[..., : self.hidden], x[..., self.hidden :]
        elif self.how == "unbind":
            gate, value = x.unflatten(-1, (2, self.hidden)).unbind(-2)
        elif self.how == "strided":
            gate, value = x[..., ::2], x[..., 1::2]
        else:
            gate, value = torch.tensor_split(x, 2, dim=-1)
        return self.down(self.act(gate) * value)


class LoRA(nn.Module):
    """A wrapper that adds a low-rank product to the result of the wrapped module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(8, 2, bias=False)
        self.up = nn.Linear(2, 8, bias=False)

    def forward(self, x, *args, **kwargs):
        return self.inner(x, *args, **kwargs) + self.up(self.down(x))


class Base(nn.Module):
    """The base of generated classes, with attributes that forwards read and write."""

    factor = 1.5

    def __init__(self):
        super().__init__()
        for name in ("gain", "scale", "shift", "extra"):
            self.register_parameter(name, nn.Parameter(1.0 + 0.3 * torch.randn(8)))
        self.matrix = nn.Parameter(0.5 * torch.randn(8, 8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.counter, self.flag, self.act_name, self.function = 0, True, "silu", F.gelu
        self.losses, self.cache = [], {}

    @property
    def midway(self):
        return 0.5 * self.gain

    def count(self):
        global TOTAL
        TOTAL += 1
        self.counter += 1


def called(function, *args, use_reentrant=False):
    """Replaces `checkpoint` in programs with random numbers."""
    return function(*args)


def logged(function):
    """A decorator that logs calls."""

    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        LOG.append(function.__name__)
        return function(self, *args, **kwargs)

    return wrapper


def doubled(function):
    """A decorator that changes results, without `functools.wraps`."""

    def wrapper(*args, **kwargs):
        return 2 * function(*args, **kwargs)

    return wrapper


@contextlib.contextmanager
def entered(name):
    LOG.append(f"in {name}")
    try:
        yield
    finally:
        LOG.append(f"out {name}")


def noting(name):
    """A hook of any kind that logs its arguments."""

    def hook(module, *seen):
        LOG.append((name, type(module).__name__, [_noted(value) for value in seen]))

    return hook


def _noted(value):
    if isinstance(value, (tuple, list)):
        return [_noted(one) for one in value]
    return value.detach().clone() if isinstance(value, Tensor) else type(value).__name__


def halving(module, args, output):
    return output * 0.5


def shifting(module, args):
    return (args[0] + 0.25, *args[1:])


def scaling_gradients(module, grad_input, grad_output):
    return tuple(None if g is None else 2 * g for g in grad_input)
