"""Steps of a program: calls of the model, and users' actions between calls.

An action is the text of statements that run in the twin's own module; `$p` is the path of a child of one of the given
kinds, and SAMPLE is a tensor.
"""

import random
from dataclasses import dataclass

LEVELS = ("block", "output", "all")


@dataclass(frozen=True)
class Step:
    """A step whose `text` is run; for a call, an expression of the model and the arguments x and y.

    `rows` is 0 for steps without a call. `gradients`: the call is followed by a backward pass. `leaf`: x itself is a
    leaf. `wanted`: x requires a gradient. `tagged`: the arguments have a tensor subclass. `twin`: only the converted
    twin takes the step.
    """

    text: str
    rows: int = 0
    gradients: bool = True
    leaf: bool = False
    wanted: bool = True
    tagged: bool = False
    autocast: bool = False
    twin: bool = False

    def __str__(self) -> str:
        if self.twin:
            return f"converted twin only: {self.text}"
        if not self.rows:
            return self.text.replace("\n", "\n#   ")
        how = [name for name in ("leaf", "tagged", "autocast") if getattr(self, name)]
        how += [] if self.gradients else ["no_grad"]
        how += [] if self.wanted else ["x wants no gradient"]
        return ", ".join([f"call {self.text} with {self.rows} rows", *how])


HOOKS: tuple[tuple[str, str], ...] = (
    ("norm act lin mlp block", "$p.register_forward_hook(noting('after'))"),
    ("norm act lin mlp block", "$p.register_forward_pre_hook(noting('before'))"),
    ("norm act lin mlp", "HANDLES.append($p.register_forward_hook(halving))"),
    ("norm act lin first last drop", "HANDLES.append($p.register_forward_pre_hook(shifting))"),
    ("norm act lin mlp drop", "$p.register_full_backward_hook(noting('backward'))"),
    ("norm act lin", "$p.register_full_backward_pre_hook(noting('backward before'))"),
    ("act lin", "HANDLES.append($p.register_full_backward_hook(scaling_gradients))"),
    ("", "while HANDLES:\n    HANDLES.pop().remove()"),
)
PARTS: tuple[tuple[str, str], ...] = (
    ("norm act drop lin mlp block", "$p = nn.Identity()"),
    ("norm act lin mlp block", "$p = LoRA($p)"),
    ("act iact", "$p = nn.Hardtanh()"),
    ("act iact", "$p = nn.ReLU()"),
    ("act", "$p = QuickGELU()"),
    ("act", "$p = nn.Softsign()"),
    ("norm bn", "$p = nn.LayerNorm(8)"),
    ("norm lin", "$p = RMSNormPlus(8)"),
    ("layers", "$p.append(nn.Sequential(nn.Linear(8, 8), nn.GELU()))"),
    ("layers", "$p[0] = nn.Identity()"),
    ("layers", "$p.insert(0, SwiGLU(8, 8))"),
    ("table", "$p['more'] = nn.Sequential(nn.LayerNorm(8), nn.SiLU())"),
)
SETTINGS: tuple[tuple[str, str], ...] = (
    ("norm bn", "$p.eps = 0.1"),
    ("norm bn", "$p.eval()"),
    ("norm bn act", "$p.train(False)"),
    ("bn", "$p.momentum = 0.5"),
    ("bn", "$p.track_running_stats = False"),
    ("act", "$p.approximate = 'tanh'"),
    ("act iact", "$p.inplace = False"),
    ("act", "$p.alpha = $p.beta = $p.negative_slope = 0.5"),
    ("drop", "$p.p = 1.0\n$p.eval()"),
    ("drop", "$p.inplace = True"),
    ("lin first last", "$p.bias = None"),
    ("lin norm first", "$p.requires_grad_(False)"),
    ("lin norm", "for p in $p.parameters():\n    p.data.mul_(0.5)"),
    ("mlp", "$p.how = 'split'"),
    ("", "model.requires_grad_(False)"),
    ("", "model.requires_grad_(True)"),
    ("", "model.gain = nn.Parameter(torch.ones(8))"),
    ("", "model.mean = torch.ones(8)"),
    ("", "model.flag = not model.flag"),
    ("", "model.act_name = 'tanh'"),
    ("", "model.function = torch.tanh"),
    ("", "model.counter = 3\nmodel.losses.clear()"),
    ("", "Base.factor = 0.5"),
    ("", "Model.factor = 3.0\nmodel.factor = 0.2"),
    ("", "CONFIG.act = 'gelu'"),
    ("", "CONFIG.scale = 2.0"),
    ("", "CONFIG.eps = 0.1"),
    ("", "CONFIG.deep = False"),
    ("", "ACTS['silu'] = torch.tanh"),
    ("", "F = types.SimpleNamespace(**(vars(F) | {'silu': torch.tanh, 'gelu': F.relu}))"),
    ("", "math = types.SimpleNamespace(sqrt=lambda value: 1.0, pi=3.0)"),
)
PATCHES: tuple[tuple[str, str], ...] = (
    ("norm act lin mlp", "$p.forward = lambda x, inner=$p.forward: 2 * inner(x)"),
    ("norm act lin mlp", "$p.forward = types.MethodType(lambda self, x: torch.tanh(x), $p)"),
    ("", "for kind in (ErfGELU, QuickGELU, NewGELU, Swish):\n    kind.forward = lambda self, x: torch.tanh(x)"),
    ("", "ReLUSquared.forward = lambda self, x: F.relu(x)"),
    ("", "SwiGLU.forward = lambda self, x: self.w2(F.gelu(self.w1(x)) * self.w3(x))"),
    ("", "PackedMLP.forward = lambda self, x: self.down(self.act(self.up(x)[..., : self.hidden]))"),
    ("", "RMSNormUp.forward = lambda self, x: x * self.weight"),
    ("", "RMSNormPlus._norm = lambda self, x: x"),
    ("", "Model.forward = logged(Model.forward)"),
    ("", "Model.midway = property(lambda self: 2 * self.gain)"),
    ("", "Base.count = lambda self: LOG.append('counted')"),
)
WHOLE: tuple[tuple[str, str], ...] = (
    ("", "model.eval()"),
    ("", "model.eval()"),
    ("", "model.train()"),
    ("", "model.double()"),
    ("", "model.to(torch.bfloat16)"),
    ("", "import copy\nmodel = copy.deepcopy(model)"),
    ("", "import copy\nmodel = copy.deepcopy(model)"),
    ("", "import pickle\nmodel = pickle.loads(pickle.dumps(model))"),
    ("", "model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})"),
    ("", "other = Model()\nmodel.load_state_dict(other.state_dict(), strict=False)"),
    ("", "LOG.append(list(model.state_dict()))"),
    ("", "LOG.append(repr(model))"),
    ("", "LOG.append([(type(m).__name__, isinstance(m, Base)) for m in model.modules()])"),
    ("", "LOG.append(Model().eval()(SAMPLE))"),
    ("", "for p in model.parameters():\n    p.data.sub_(0.01 * (0 if p.grad is None else p.grad.clamp(-1, 1)))"),
    ("", "model.apply(lambda m: m.reset_parameters() if hasattr(m, 'reset_parameters') else None)"),
)


def steps(
    rng: random.Random, parameters: str, paths: list[tuple[str, str]], no_grad: bool, rows: tuple[int, ...]
) -> tuple[Step, ...]:
    """Random calls with numbers of rows from `rows`, and actions in between; `paths` has the kinds and paths of the
    model's children."""
    taken = [Step("model.eval()")] if rng.random() < 0.12 else []
    taken.append(_call(rng, parameters, no_grad, rows))
    for _ in range(rng.randint(1, 4)):
        taken.append(_twin(rng) if rng.random() < 0.12 else _action(rng, paths))
        taken.append(_call(rng, parameters, no_grad, rows))
    return tuple(taken)


def _action(rng: random.Random, paths: list[tuple[str, str]]) -> Step:
    while True:
        (table,) = rng.choices((HOOKS, PARTS, SETTINGS, PATCHES, WHOLE), (4, 4, 5, 3, 5))
        kinds, text = rng.choice(table)
        fitting = [path for kind, path in paths if kind in kinds.split()]
        if not kinds or fitting:
            return Step(text.replace("$p", rng.choice(fitting)) if kinds else text)


def _twin(rng: random.Random) -> Step:
    level = rng.choice(("", *LEVELS))
    return Step(f"convert(model, recompute={level!r})" if level else "revert(model)", twin=True)


def _call(rng: random.Random, parameters: str, no_grad: bool, rows: tuple[int, ...]) -> Step:
    texts = ["model(x)", "model(x)"]
    if "*" in parameters or "y" in parameters:
        texts += ["model(x, y)", "model(x, y=y)", "model(x, x)"]
    if "scale" in parameters:
        texts.append("model(x, scale=0.5)")
    texts.append("model.forward(x)" if rng.random() < 0.5 else "checkpoint(model, x, use_reentrant=False)")
    return Step(
        rng.choice(texts),
        rng.choice(rows),
        gradients=not no_grad and rng.random() < 0.85,
        leaf=rng.random() < 0.05,
        wanted=rng.random() < 0.85,
        tagged=rng.random() < 0.03,
        autocast=rng.random() < 0.04,
    )
