# Sourced by the other scripts: makes .venv in the repository's root and installs vqcompress into it.
# Usage: source scripts/venv.sh EXTRA       EXTRA: "" or test
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:-}"
stamp=".venv/.installed${extra:+-$extra}"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
source .venv/bin/activate
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

install_torch() {
    if python -c 'import torch' 2>/dev/null; then return; fi
    echo "installing torch …" >&2
    if command -v nvidia-smi >/dev/null || command -v rocminfo >/dev/null || [ "$(uname -s)" != Linux ]; then
        pip install -q 'torch>=2.11'
    else
        # No GPU: the CPU build, which is a tenth of the size. Where neither place has it, the default build.
        pip install -q 'torch==2.13.0+cpu' 2>/dev/null ||
            pip install -q 'torch==2.13.0+cpu' --index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
            pip install -q 'torch==2.13.0'
    fi
}

if ! cmp -s pyproject.toml "$stamp"; then
    install_torch
    echo "installing vqcompress${extra:+[$extra]} …" >&2
    pip install -q -e ".${extra:+[$extra]}"
    cp pyproject.toml "$stamp"
fi
