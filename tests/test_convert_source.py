"""Converted forwards compute what their source says: many kinds of code, compared with the original."""

import copy
import threading
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ckpt_kernels
from ckpt_kernels.nested_values import tensors_in

from .conftest import DEVICE
from .conversion import INNER, WIDTH, close, kept, random_tensor, reason_of, replacement_of, results_of, twins


class Forward(nn.Module):
    """A module with several forward passes, selected by `how`."""

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
        rows = rows + self.norm.weight.expand(h.shape[0], -1) + F.interpolate(rows[None], size=WIDTH)[0]
        resized = F.interpolate(h[None, None], size=(h.shape[0], WIDTH), mode="bilinear")[0, 0]
        return padded[:, h.shape[0] :] + rows + resized + torch.tensor(h.shape[0], device=h.device)

    def checkpointed(self, h: Tensor) -> Tensor:
        return self.norm(h + checkpoint(self.mlp, h, use_reentrant=False))

    def reversed(self, h: Tensor) -> Tensor:
        return self.mlp(Reversed.apply(self.norm(h)))

    def distilled(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.mlp(h)
        return (self.mlp(h) - target - self.teacher(h)) ** 2 + self.norm(h)

    def has_side_effects(self, h: Tensor) -> Tensor:
        y = self.mlp(h)
        self.losses.append(y.square().mean())
        self.calls += 1
        return y

    def returns_a_mapping(self, h: Tensor) -> Any:
        return Answer(value=self.mlp(h), nothing=None, more=[(self.norm(h), None)])

    def compares_identities(self, h: Tensor) -> Tensor:
        q, k = h, h
        y = self.mlp(q)
        if q is k and h.dtype is torch.float32 and None not in [id(y)]:
            y = -y
        return y

    def catches_an_error(self, h: Tensor) -> Tensor:
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
    """A mapping with attributes, as transformers returns."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__.update(items)


HOWS = (
    *("sizes", "checkpointed", "reversed", "distilled"),
    *("has_side_effects", "returns_a_mapping", "compares_identities", "catches_an_error"),
)


@pytest.mark.parametrize("recompute", ("block", "output", "all"))
@pytest.mark.parametrize("how", HOWS)
def test_converted_forwards_equal_the_original(how: str, recompute: str) -> None:
    model, twin = twins(lambda: Forward(how))
    ckpt_kernels.convert(model, recompute=recompute)
    assert model.calls == 0 and model.losses == []
    for rows in (3, 5):
        results = []
        for module in (model, twin):
            given = random_tensor(rows, WIDTH).requires_grad_()
            module.zero_grad()
            answer = module(given)
            outputs = list(tensors_in(answer))
            sum((y * y.detach().cos()).sum() for y in outputs if y.requires_grad).backward()
            grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
            results.append((type(answer), dict(enumerate(outputs)) | grads | {"input": given.grad}))
        (kind, ours), (their_kind, theirs) = results
        assert kind is their_kind and ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5)
    assert model.calls == twin.calls and len(model.losses) == len(twin.losses)
    assert all(type(loss) is Tensor for loss in model.losses)


def test_a_checkpoint_in_a_forward_keeps_no_more() -> None:
    model, twin = twins(lambda: Forward("checkpointed"))
    ckpt_kernels.convert(model)
    assert kept(model, random_tensor(64, WIDTH)) <= kept(twin, random_tensor(64, WIDTH))


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
        new = dict(vars(module))
        assert new.keys() == old.keys() and all(new[key] is old[key] for key in old)
    assert model[0].seen == 0 and model[0].settings == {"problem": None}
    assert replacement_of(ckpt_kernels.convert(model), "0") is None


# Changes between calls


def test_changed_attributes_are_read() -> None:
    model, twin = twins(lambda: nn.TransformerEncoderLayer(WIDTH, 4, INNER, 0.0, batch_first=True))
    ckpt_kernels.convert(model)
    given = random_tensor(2, 5, WIDTH)
    torch.testing.assert_close(model(given), twin(given), rtol=1e-4, atol=1e-5)
    for module in (model, twin):
        module.activation = F.silu
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
    for module in (model, twin):
        module.layers[1] = nn.Tanh()
        module.layers.append(added)
        for step in range(20):
            module.epoch = step
    torch.testing.assert_close(model(random_tensor(3, WIDTH)), twin(random_tensor(3, WIDTH)))


def test_a_fused_forward_stays_fused_while_attributes_change() -> None:
    model, twin = twins(lambda: Forward("mlp"))
    ckpt_kernels.convert(model, recompute="all")
    fewest = kept(model, random_tensor(64, WIDTH))
    for step in range(40):
        for module in (model, twin):
            module.epoch = module.act.step = module.first.scale = step
        torch.testing.assert_close(model(random_tensor(3, WIDTH)), twin(random_tensor(3, WIDTH)))
        assert kept(model, random_tensor(64, WIDTH)) == fewest < kept(twin, random_tensor(64, WIDTH))


@pytest.mark.parametrize("recompute", ("block", "output", "all"))
def test_a_classifier_of_transformers_chooses_its_loss_in_the_call(recompute: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=INNER
    )
    model, twin = twins(lambda: transformers.BertForSequenceClassification(config).eval())
    ckpt_kernels.convert(model, recompute=recompute)
    assert model.config.problem_type is None
    ids, labels = torch.arange(10, device=DEVICE).view(2, 5), torch.tensor([0, 1], device=DEVICE)
    ours, theirs = (module(ids, labels=labels) for module in (model, twin))
    assert model.config.problem_type == twin.config.problem_type == "single_label_classification"
    assert type(ours) is type(theirs) and isinstance(ours, transformers.utils.ModelOutput)
    for name in ("loss", "logits"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
        assert getattr(ours, name) is ours[name]


def test_patched_methods_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = twins(lambda: Forward("mlp"))
    ckpt_kernels.convert(model)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, h: 2 * F.linear(h, self.weight, self.bias))
    torch.testing.assert_close(model(random_tensor(3, WIDTH)), twin(random_tensor(3, WIDTH)))
    monkeypatch.setattr(Forward, "mlp", lambda self, h: self.first(h))
    torch.testing.assert_close(model(random_tensor(3, WIDTH)), twin(random_tensor(3, WIDTH)))
    model.act.register_forward_hook(lambda module, args, output: output * 0)
    monkeypatch.undo()
    torch.testing.assert_close(model(random_tensor(3, WIDTH)), model.last.bias.expand(3, -1))


def test_hooks_for_all_modules_see_all_modules() -> None:
    model, _ = twins(lambda: Forward("mlp"))
    ckpt_kernels.convert(model)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    model(random_tensor(3, WIDTH))
    handle.remove()
    assert seen == [model.first, model.act, model.last, model]


def test_threads_convert_and_run_concurrently() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            model = Forward("mlp").to(DEVICE)
            twin = copy.deepcopy(model)
            ckpt_kernels.convert(model)
            for _ in range(5):
                torch.testing.assert_close(model(random_tensor(3, WIDTH)), twin(random_tensor(3, WIDTH)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_tracebacks_show_the_original_lines() -> None:
    model, _ = twins(lambda: Forward("mlp"))
    ckpt_kernels.convert(model)
    ours, theirs = type(model).mlp.__wrapped__.__code__, Forward.mlp.__code__
    assert ours.co_filename == theirs.co_filename and ours.co_firstlineno == theirs.co_firstlineno
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes") as caught:
        model(random_tensor(3, WIDTH + 1))
    lines = {entry.lineno + 1 for entry in caught.traceback if entry.path.name == "test_convert_source.py"}
    assert theirs.co_firstlineno + 1 in lines


def test_the_converted_class_makes_original_modules() -> None:
    model, _ = twins(lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.GELU()))
    ckpt_kernels.convert(model)
    assert ckpt_kernels.is_converted(model[0]) and type(model[0]) is not nn.LayerNorm
    made = type(model[0])(WIDTH)
    assert type(made) is nn.LayerNorm and not ckpt_kernels.is_converted(made)


def test_a_class_that_cannot_be_subclassed_is_reported() -> None:
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
    assert "subclassed" in reason_of(report, "") and replacement_of(report, "act") == "bias_act (gelu)"
    assert type(model) is Final and close(
        results_of(model, random_tensor(3, WIDTH)), results_of(twin, random_tensor(3, WIDTH)), 1e-5
    )


def test_missing_modules_and_default_devices_are_no_error() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), None])
            self.norm = nn.RMSNorm(WIDTH, elementwise_affine=False)

        def forward(self, h: Tensor) -> Tensor:
            return self.norm(self.layers[0](h))

    model, twin = twins(Sparse)
    assert replacement_of(ckpt_kernels.convert(model), "norm") == "rms_norm"
    assert close(results_of(model, random_tensor(3, WIDTH)), results_of(twin, random_tensor(3, WIDTH)), 1e-5)
    with torch.device("meta"):
        ckpt_kernels.convert(model)
    assert close(results_of(model, random_tensor(3, WIDTH)), results_of(twin, random_tensor(3, WIDTH)), 1e-5)
