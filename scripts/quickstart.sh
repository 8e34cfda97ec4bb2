#!/usr/bin/env bash
# Compress the bundled demo checkpoint with every packaged weight recipe and print one table. Needs Python ≥ 3.11.
source "$(dirname "$0")/venv.sh" ""
python scripts/quickstart.py "$@"
