#!/usr/bin/env bash
# Installs the wheel in dist/ into a fresh environment, and runs `doctor` and some contract tests there.
# Arguments: a python, and the torch to install ("torch==2.11.0"). Needs no compiler.
set -euo pipefail
python=${1:?a python}
torch=${2:?a torch, such as torch==2.11.0}
cd "$(dirname "$0")/.."
wheel=$(realpath dist/*.whl)
there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT
"$python" -m venv "$there/venv"
"$there/venv/bin/pip" install -q "$torch" pytest hypothesis numpy
"$there/venv/bin/pip" install -q --no-deps "$wheel"
# Outside the checkout, so that the installed package is imported.
cp -r tests "$there/tests"
cd "$there"
export PATH="$there/venv/bin:/usr/bin:/bin"
python --version
ckpt-kernels doctor
python -m pytest -q -p no:cacheprovider tests/test_contract_numbers.py tests/test_contract_memory.py \
    tests/test_activations.py -k native "${@:3}"
