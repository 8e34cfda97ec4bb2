#!/usr/bin/env bash
# All that can only be seen on a GPU, in less than nine minutes: tests, kernels against cuBLAS, a whole model.
# Usage: bash scripts/bench_gpu.sh [--interpret]
#   --interpret: without a GPU; kernels run in Triton's interpreter on tiny shapes, for their correctness alone.
# Uses the Python that has torch, without installing anything, or else makes .venv. Results: benchmarks/results/.
set -euo pipefail
cd "$(dirname "$0")/.."
if python3 -c 'import torch, triton, transformers, numba, pydantic' 2>/dev/null; then
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    python() { python3 "$@"; }
else
    source scripts/venv.sh test
fi
export HF_HUB_OFFLINE=1
if [ "${1:-}" = --interpret ]; then
    python scripts/bench_kernels.py --interpret
    python scripts/bench_model.py --layers 1 --hidden 128 --device cpu --new-tokens 8
    exit
fi
if ! python -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    echo "torch sees no GPU here; --interpret does a dry run on the CPU" >&2
    exit 1
fi
name="$(python -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "_"))')"
results="benchmarks/results/${name}.jsonl"
mkdir -p benchmarks/results
failed=0
if python -c 'import pytest, hypothesis' 2>/dev/null; then
    timeout 120 python -m pytest -q -m gpu -p no:cacheprovider tests || failed=1
else
    echo "pytest or hypothesis is missing: the tests are left out" >&2
fi
python scripts/bench_kernels.py --limit 240 --json "$results" || failed=1
timeout 150 python scripts/bench_model.py --json "$results" || failed=1
exit "$failed"
