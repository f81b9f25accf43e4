#!/usr/bin/env bash
# Makes the environment and checks everything: lint, format, types, tests.
#
#   bash run/test.sh                        # all but the tests that need a GPU or half an hour
#   bash run/test.sh tests/models -k dvae   # arguments go to pytest
#
# Hardware: 2 CPU cores.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/run/setup.sh"
export PATH="$root/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
cd "$root"
ruff check .
ruff format --check .
mypy .
python run/check_files.py
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not nightly" "$@"
