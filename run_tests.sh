#!/usr/bin/env bash
# Lint, format, types and tests: ./run_tests.sh [--slow] [pytest arguments]
# --slow adds the slow tests. Set PYTHON to choose the interpreter; needs no network once .venv is made.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
. "$root/scripts/environment.sh"
cd "$root"
use_environment torch pytest pytest_timeout xdist hypothesis transformers tokenizers mkdocs ruff mypy
export HF_HUB_OFFLINE=1

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the processes and their ranks share the cores
# Two processes, each with ranks of its own: much of the suite waits for processes to start. -n 0 takes one.
exec "$python" -m pytest --numprocesses=2 --dist=loadfile "$@"
