#!/usr/bin/env bash
# Format, lint and types. `scripts/lint.sh --fix` formats and mends what can be mended.
source "$(dirname "$0")/venv.sh" test
if [ "${1:-}" = --fix ]; then
    ruff format .
    ruff check --fix .
else
    ruff format --check .
    ruff check .
fi
mypy
