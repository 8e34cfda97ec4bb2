#!/usr/bin/env bash
# Compress the bundled demo checkpoint with every recipe of weights that needs no budget and print one table. Needs Python ≥ 3.11.
source "$(dirname "$0")/venv.sh" ""
python scripts/quickstart.py "$@"
