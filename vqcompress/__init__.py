"""vqcompress: SmoothQuant INT8, tile-wise FP8 and vector quantization for large language models.

Importing it teaches `transformers.AutoModelForCausalLM.from_pretrained` to load compressed artifacts.
"""

from __future__ import annotations

import time
from typing import Any

from vqcompress.runtime import autoload

__version__ = "0.1.0"
__all__ = ["__version__", "load"]
# Start of the process: the time of a command includes its imports.
STARTED = time.perf_counter()

autoload.install()


def __getattr__(name: str) -> Any:
    """`vqcompress.load`, imported at its first use because it imports torch and transformers."""
    if name == "load":
        from vqcompress.runtime.load import load

        return load
    raise AttributeError(f"module 'vqcompress' has no attribute '{name}'")
