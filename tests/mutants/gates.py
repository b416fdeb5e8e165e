"""Faults in the recognition of gates of two halves, and in the recipes of experts."""

from .mutant import Mutant

_GATES = "ckpt_kernels/convert/rules/gates.py"
_TRIALS = "ckpt_kernels/convert/rules/gate_trials.py"
_RUNS = "ckpt_kernels/convert/rewriting/gate_runs.py"
_OTHERS = "tests/test_convert_gates.py -k other_functions"
_CHANGES = "tests/test_convert_gates.py -k changes"

GATES = (
    Mutant(
        "the limit of a gate may change after the trial",
        _GATES,
        "not is_unchanged(module, settings, self.code)",
        "False",
        _CHANGES,
    ),
    Mutant(
        "the activation of a gate may change after the trial",
        _GATES,
        "activation_of(children.get(name), wide=wide) != activation",
        "False",
        _CHANGES,
    ),
    Mutant(
        "a gate shares the memory of an input that torch copies",
        _GATES,
        "is_copied = «not keeps_input and »torch",
        "False and ",
        "tests/test_convert_gates.py -k write_to_an_input",
    ),
    Mutant(
        "a gate may take parts of a fixed size",
        "ckpt_kernels/convert/code/function_reachability.py",
        "not is_size_independent(function)",
        "False",
        _OTHERS,
    ),
    Mutant(
        "a gate may have any gradient",
        _TRIALS,
        "of_results == 0 and «of_gradients <= 2»",
        "True",
        _OTHERS,
    ),
    Mutant(
        "names of a run that is a gate may be read later",
        _RUNS,
        "not all(is_dead(name, function, block, begin, end) for name in bound)",
        "False",
        _OTHERS,
    ),
    Mutant(
        "the last product of any linear layer runs again",
        "ckpt_kernels/recompute/provenance.py",
        "rule.of_experts and not reads_stacked_weight(node)",
        "False",
        "tests/test_convert_experts.py -k other_products",
    ),
    Mutant(
        "a note says that a cast's written operand is unwritten",
        "ckpt_kernels/recompute/announcing.py",
        "not all(map(nodes.is_unwritten, tensors))",
        "False",
        "tests/test_convert_experts.py -k same_bits",
    ),
)
