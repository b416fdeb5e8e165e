"""Faults in the Python of all floors."""

from .mutant import Mutant
from .selections import DROPPED

_RECOMPUTE = "ckpt_kernels/recompute/discarder.py"
_VIEWS = "tests/test_recompute.py -k more_than_strides"
_BAD = "tests/test_row_norm.py -k bad_input"
PYTHON = (
    Mutant(
        "a negative view of an output is rebuilt as the output",
        _RECOMPUTE,
        "tensor.is_neg()",
        "False",
        _VIEWS,
    ),
    Mutant(
        "a view in another dtype is rebuilt in the output's",
        _RECOMPUTE,
        "tensor.dtype is not entry.dtype",
        "False",
        _VIEWS,
    ),
    Mutant(
        "a view in another dtype is rebuilt in that of torch's own result",
        _RECOMPUTE,
        "tensor.dtype != root.dtype",
        "False",
        _VIEWS,
    ),
    Mutant(
        "an output is forgotten with its tensor, though its memory lives",
        "ckpt_kernels/recompute/entries.py",
        "return «self.by_storage.get(tensor.untyped_storage()._cdata)» if self.by_storage",
        "next((e for e in [self.by_storage.get(tensor.untyped_storage()._cdata)] if e and e.output() is not None), "
        "None)",
        "tests/test_recompute.py -k outlives",
    ),
    Mutant(
        "a cast is made again of what the block made, whatever was written to it",
        "ckpt_kernels/recompute/provenance.py",
        "output == 0 and block.is_unwritten()",
        "output == 0",
        "tests/test_recompute.py -k cast_of_what_was_written",
    ),
    Mutant(
        "writes that the graph does not know are not counted",
        "ckpt_kernels/recompute/provenance.py",
        "version - block.entry.version != len(nodes)",
        "False",
        "tests/test_recompute.py tests/test_provenance_writes.py -k 'written or write or unseen'",
    ),
    Mutant(
        "a kept tensor may be written to",
        "ckpt_kernels/recompute/contents.py",
        "if tensor._version != self.version",
        "if False",
        "tests/test_recompute.py -k write_to_what_is_kept",
    ),
    Mutant(
        "a rebuilt output waits for one reader more",
        "ckpt_kernels/recompute/recipes.py",
        "waiting = [c for c in self._live() if «c is not claim and »c.served != where]",
        "",
        "tests/test_recompute.py tests/test_recompute_graphs.py -k freed",
        "the reader that asks gives back its own hold of the tensor at once, whoever else is waiting",
    ),
    Mutant(
        "a gated MLP writes its output again without dropout",
        "ckpt_kernels/ops/linear_blocks.py",
        "return gradients, None if product is None else «dropped(product)»",
        "product",
        DROPPED.format("reference and gated"),
    ),
    Mutant(
        "a gated MLP's gradient goes past the mask",
        "ckpt_kernels/ops/linear_blocks.py",
        "glu.gradient(«dropped(grad)»,",
        "grad",
        DROPPED.format("reference and gated"),
    ),
    Mutant(
        "the last product of an MLP runs again, though nothing needs it",
        "ckpt_kernels/ops/linear.py",
        "operands = products_of(input, firsts, ctx.dtype)\n        inner_needs",
        "operands = products_of(input, firsts, ctx.dtype)\n"
        "        product_of(ctx.block.forward(operands)[0], weight, None, ctx.dtype)\n        inner_needs",
        "tests/test_linear.py -k one_product_less",
    ),
    Mutant(
        "an MLP drops out in eval",
        "ckpt_kernels/nn/mlp.py",
        "last.bias,\n            activation=self.activation,\n            dropout_p=self.dropout,\n"
        "            training=«self.training»",
        "True",
        "tests/test_linear.py -k test_modules",
    ),
    Mutant(
        "a fused call passes over what is called before its parts",
        "ckpt_kernels/nn/by_parts.py",
        'held["_forward_hooks"] or «held["_forward_pre_hooks"]»',
        "False",
        "tests/test_linear_parts.py -k 'computed_before or dropout_between'",
    ),
    Mutant(
        "a trace records what saved-tensor hooks do",
        "ckpt_kernels/recompute/contexts.py",
        "is_recorded = torch.compiler.is_compiling() or «torch._C._get_tracing_state() is not None»",
        "False",
        "tests/test_transforms_modules.py -k 'convolutions_each_time and output'",
    ),
    Mutant(
        "dropout in eval",
        "ckpt_kernels/functional/checks.py",
        "p = p if training else 0.0",
        "p = p",
        "tests/test_row_norm.py tests/test_bias_act.py -k 'zero_and_one and reference'",
    ),
    Mutant(
        "eps of an RMSNorm in float64 is float32's",
        "ckpt_kernels/functional/checks.py",
        "torch.finfo(«torch.float64 if wide else torch.float32»).eps",
        "torch.float32",
        "tests/test_row_norm.py -k eps_none",
    ),
    Mutant(
        "a scale may be of other samples",
        "ckpt_kernels/functional/checks.py",
        "!= shape or «samples != lead[: len(samples)]»",
        "False",
        _BAD,
    ),
    Mutant(
        "a scale may have other columns",
        "ckpt_kernels/functional/checks.py",
        "if «tuple(tensor.shape[-len(shape) :]) != shape» or samples",
        "False",
        _BAD,
    ),
    Mutant(
        "a shift may be anywhere",
        "ckpt_kernels/functional/modulated_row_norm.py",
        'check_modulation(shift, "shift", input, normalized_shape)',
        "pass",
        _BAD,
    ),
    Mutant(
        "scale and shift may be of different samples",
        "ckpt_kernels/functional/modulated_row_norm.py",
        "scale.numel() != shift.numel()",
        "False",
        _BAD,
    ),
    Mutant(
        "a modulated norm's weight may have any shape",
        "ckpt_kernels/functional/modulated_row_norm.py",
        'that of scale, {shape_of(scale)}")\n    «check_coefficient(weight, "weight", input, normalized_shape)»',
        "pass",
        _BAD,
    ),
    Mutant(
        "a scale's gradient alone lacks the bias's part",
        "ckpt_kernels/ops/row_norm.py",
        "need_offset = «wanted.scale or »wanted.shift",
        "",
        "tests/test_contract_memory.py -k each_gradient_alone",
    ),
    Mutant(
        "a gate's gradient alone is not computed where the gate comes first",
        "ckpt_kernels/ops/row_norm.py",
        "both = options.gate_before_norm and («wanted.input or wanted.gate»)",
        "wanted.input",
        "tests/test_contract_memory.py -k each_gradient_alone",
    ),
    Mutant(
        "the last, shorter piece counts whole, in the reference",
        "ckpt_kernels/backends/reference/channel_norm.py",
        "counts[-1] = «size - (pieces - 1) * piece_rows»",
        "piece_rows",
        "tests/test_channel_norm.py -k 'every_shape and reference and 131'",
    ),
)
