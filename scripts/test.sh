#!/usr/bin/env bash
# The whole test suite, on one process a core. Arguments go to pytest.
source "$(dirname "$0")/venv.sh" test
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m pytest -q -n auto --dist worksteal "$@"
