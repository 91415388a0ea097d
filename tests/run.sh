#!/usr/bin/env bash
# Set-up, lint, types and tests in one command; arguments go to pytest (bash tests/run.sh -k rope).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
install_into_venv dev

ruff check .
ruff format --check .
mypy
# Many tests start processes, which then find the modules compiled.
unset PYTHONDONTWRITEBYTECODE
# One thread per process: several test processes on few cores would only wait for each other.
OMP_NUM_THREADS=1 python -m pytest "$@"
