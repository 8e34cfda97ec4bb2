"""Registers the adapter with transformers when transformers comes to need it, and not a moment earlier.

`import vqcompress` must teach `AutoModelForCausalLM.from_pretrained` our format, but `vqcompress --help` must not wait
for torch. transformers has no entry points for quantizers, so this waits for its module of quantizers to be imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

QUANTIZERS = "transformers.quantizers.auto"


def _register() -> None:
    from vqcompress.runtime import hf_quantizer as adapter

    adapter.register()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as everybody else does, and registers the adapter once it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register now if transformers is loaded already, else when it is."""
    if QUANTIZERS in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())
