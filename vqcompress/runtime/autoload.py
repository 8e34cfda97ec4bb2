"""Registers the reader of artifacts with transformers as soon as transformers imports its own quantizers.

`import vqcompress` must teach `AutoModelForCausalLM.from_pretrained` the format, but `vqcompress --help` must not wait
for torch. transformers has no entry points for quantizers, so an import hook waits for its module of quantizers.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

QUANTIZERS = "transformers.quantizers.auto"


def _register() -> None:
    from vqcompress.runtime import hf_quantizer

    hf_quantizer.register()


class _ImportHook:
    """Calls `_register` once, after QUANTIZERS has been imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register
        return spec


def install() -> None:
    """Register now if transformers' quantizers are imported already, else when they are."""
    if QUANTIZERS in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _ImportHook())
