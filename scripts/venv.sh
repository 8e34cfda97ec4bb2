# Sourced by the other scripts, or run: makes .venv in the repository's root and installs vqcompress into it.
# Usage: source scripts/venv.sh EXTRA       EXTRA: "" or test
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:-}"
stamp=".venv/.installed${extra:+-$extra}"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
source .venv/bin/activate
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

# What is installed is compiled afterwards, by all cores.
install="pip install -q --no-compile"
install_torch() {
    if python -c 'import torch' 2>/dev/null; then return; fi
    echo "installing torch …" >&2
    if command -v nvidia-smi >/dev/null || command -v rocminfo >/dev/null || [ "$(uname -s)" != Linux ]; then
        $install 'torch>=2.11'
    else
        # No GPU: the CPU build, which is a tenth of the size. Where neither place has it, the default build.
        $install 'torch==2.13.0+cpu' 2>/dev/null ||
            $install 'torch==2.13.0+cpu' --index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
            $install 'torch==2.13.0'
    fi
}

if ! cmp -s pyproject.toml "$stamp"; then
    install_torch
    echo "installing vqcompress${extra:+[$extra]} …" >&2
    $install -e ".${extra:+[$extra]}"
    # Some packages bring files of other Pythons along.
    python -m compileall -qq -j 0 .venv/lib || true
    cp pyproject.toml "$stamp"
fi
[ "${BASH_SOURCE[0]}" != "$0" ] || echo "next: source .venv/bin/activate"
