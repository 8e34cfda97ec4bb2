"""The quantizer that lets `AutoModelForCausalLM.from_pretrained` load artifacts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vqcompress.storage.artifact import HINT, Artifact, Entry, parse_entries
from vqcompress.storage.checkpoint import Checkpoint
from vqcompress.storage.output import QUANT_METHOD

# This module is imported while transformers is being imported, so the methods import `vqcompress.model`, which needs
# all of transformers.
if TYPE_CHECKING:
    from transformers import PreTrainedModel


class VQCompressConfig(QuantizationConfigMixin):
    """The `quantization_config` of an artifact, unchanged. cpu_weights, check: see `load`; they are not stored."""

    def __init__(self, quant_method: str = QUANT_METHOD, **settings: Any):
        self.quant_method = quant_method  # type: ignore[assignment]
        self.cpu_weights, self.check = settings.pop("cpu_weights", "auto"), settings.pop("check", True)
        self.settings = settings

    def to_dict(self) -> dict[str, Any]:
        """JSON for config.json. Without learned codebooks of a cache: `save_pretrained` does not write their file."""
        cache = self.settings.get("kv_cache") or {}
        missing = {"kv_cache"} if cache.get("codebook") == "learned" else set()
        return {"quant_method": self.quant_method, **{k: v for k, v in self.settings.items() if k not in missing}}


def _for_class(model: PreTrainedModel, entries: list[Entry]) -> list[Entry]:
    """Entries by their names in this model, which may be of another class than the compressed one.

    AutoModel, the text part alone and the class with its tower differ in the path to the blocks.
    """
    from vqcompress.model.targets import find_blocks

    if not entries:
        return []
    here, _ = find_blocks(model)
    # The first number in a target's name is that of its block.
    there = re.split(r"\.\d+\.", entries[0].target.name)[0]

    def renamed(name: str) -> str:
        return here + name.removeprefix(there)

    targets = [replace(entry.target, name=renamed(entry.target.name)) for entry in entries]
    return [replace(e, target=t, shared=e.shared and renamed(e.shared)) for e, t in zip(entries, targets, strict=True)]


class VQCompressQuantizer(HfQuantizer):
    """Replaces linear layers by CompressedLinear before transformers loads tensors by their names."""

    requires_calibration = True
    # transformers before 5.21 calls `update_weight_conversions` without the model.
    _model: PreTrainedModel

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from vqcompress.model.linear import keep_packed, replace_linears
        from vqcompress.model.weights import Names, check_headers

        self._model = model
        config: Any = self.quantization_config
        if config.check and checkpoint_files:
            Artifact(Path(checkpoint_files[0]).parent).check_files()
        entries = _for_class(model, parse_entries(config.to_dict(), "the model"))
        with torch.device("meta"):
            replace_linears(model, "", entries, model.dtype, keep_packed(config.cpu_weights, entries, model.dtype))
        stored = {n: info for file in checkpoint_files or () for n, info in Checkpoint.header(Path(file)).items()}
        check_headers(model, Names(model, stored), stored)
        if not entries:
            return
        # transformers would report the marker tensor, which is for programs without vqcompress, as unexpected.
        # The checkpoint's names may lack the model's prefix, or have one that the model's lack.
        first = entries[0].target.name.removeprefix(f"{model.base_model_prefix}.")
        names = (HINT, rf"{re.escape(first)}\.weight", rf"{re.escape(first.rsplit('.', 2)[0])}\.\w+")
        # Of fused experts the third name fits.
        markers = {rf"(^|\.){name}$" for name in names}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *markers}

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """transformers' conversions without those that merge compressed experts."""
        from vqcompress.model.experts import without_merges

        return without_merges(model or self._model, weight_conversions)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """True: `save_pretrained` writes the packed tensors as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: codes have no gradient."""
        return False


def register() -> None:
    """Make the format known to transformers; once."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(VQCompressConfig)
        register_quantizer(QUANT_METHOD)(VQCompressQuantizer)
