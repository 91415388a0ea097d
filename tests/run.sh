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
# A process for each core, at most 8, of one thread: more threads would only wait for each other.
OMP_NUM_THREADS=1 python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal "$@"
