#!/usr/bin/env bash
# Compress two real models with every packaged weight recipe and print one table. Needs Python ≥ 3.11 and a package registry.
source "$(dirname "$0")/venv.sh" ""
python scripts/real.py "$@"
