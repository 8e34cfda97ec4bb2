#!/usr/bin/env bash
# All that can only be seen on a GPU, in less than ten minutes: tests, kernels against cuBLAS and torch, a whole model.
# Usage: bash scripts/bench_gpu.sh [--interpret]
#   --interpret: without a GPU; kernels run in Triton's interpreter on tiny shapes, for their correctness alone.
# Uses the Python that has torch and Triton, with wheels from the folder `wheels/` for what else it lacks, so that no
# network is needed; where there is no such Python it makes .venv. Results: benchmarks/results/.
set -euo pipefail
cd "$(dirname "$0")/.."
case "$*" in
"" | --interpret) ;;
-h | --help)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' scripts/bench_gpu.sh
    exit
    ;;
*)
    echo "bench_gpu.sh does not know '$*'; it takes --interpret, --help or nothing" >&2
    exit 2
    ;;
esac
needed="torch triton transformers accelerate safetensors numba pydantic typer rich yaml"
missing() { "$1" -c "import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if not u.find_spec(m)])" $needed; }
py=python3
if "$py" -c 'import torch, triton' 2>/dev/null; then
    if [ -n "$(missing "$py")" ] && [ -d wheels ]; then
        "$py" -m venv --system-site-packages .venv-wheels
        py="$PWD/.venv-wheels/bin/python"
        "$py" -m pip install -q --no-index --find-links wheels $(missing "$py" | sed 's/yaml/pyyaml/')
    fi
    if [ -n "$(missing "$py")" ]; then
        echo "$py has torch and Triton but not: $(missing "$py"); install them, or put their wheels into wheels/" >&2
        exit 1
    fi
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
else
    source scripts/venv.sh test
    py="$PWD/.venv/bin/python"
fi
export HF_HUB_OFFLINE=1
if [ "${1:-}" = --interpret ]; then
    "$py" scripts/bench_kernels.py --interpret
    "$py" scripts/bench_attention.py --interpret
    "$py" scripts/tune.py --dry-run --rows 1 16
    "$py" scripts/bench_model.py --layers 1 --hidden 128 --device cpu --new-tokens 8
    exit
fi
if ! "$py" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    echo "torch sees no GPU here; --interpret does a dry run on the CPU" >&2
    exit 1
fi
results="benchmarks/results/$("$py" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "_"))').jsonl"
mkdir -p benchmarks/results
failed=0
timeout 170 "$py" scripts/bench_kernels.py --limit 140 --json "$results" || failed=1
timeout 90 "$py" scripts/bench_attention.py --limit 60 --json "$results" || failed=1
timeout 200 "$py" scripts/bench_model.py --recipes vq-2bit fp8-tile --json "$results" || failed=1
if "$py" -c 'import pytest, hypothesis' 2>/dev/null; then
    parallel=$("$py" -c 'import xdist, os; print("-n", min(8, os.cpu_count()))' 2>/dev/null || true)
    timeout 120 "$py" -m pytest -q -m gpu -p no:cacheprovider $parallel tests || failed=1
else
    echo "pytest or hypothesis is missing: the tests are left out" >&2
fi
exit "$failed"
