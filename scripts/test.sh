#!/usr/bin/env bash
# Run the default tests on one process per core. Arguments go to pytest: `-m slow` runs the slow tests instead.
source "$(dirname "$0")/venv.sh" test
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# worksteal: tests of a file mostly stay on one worker, and checkpoints and artifacts of tests are made once for all workers.
# A later -m wins over this one.
python -m pytest -q -n auto --dist worksteal -m "not slow" "$@"
