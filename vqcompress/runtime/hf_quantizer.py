"""`AutoModelForCausalLM.from_pretrained(artifact)`: a thin HfQuantizer over the runtime's modules."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vqcompress.storage.artifact import HINT, QUANT_METHOD, parse_entries
from vqcompress.storage.checkpoint import Checkpoint

# This is imported in the middle of transformers' own imports: what needs more of it is imported by the methods.
if TYPE_CHECKING:
    from transformers import PreTrainedModel


class VQCompressConfig(QuantizationConfigMixin):
    """The `quantization_config` of an artifact, kept as it is."""

    def __init__(self, quant_method: str = QUANT_METHOD, **settings: Any):
        self.quant_method = quant_method  # type: ignore[assignment]
        self.settings = settings

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds; codebooks of a cache lie in a file of the artifact, which nobody else writes."""
        learned = bool(self.settings["targets"]) and (self.settings.get("kv_cache") or {}).get("codebook") == "learned"
        kept = {name: value for name, value in self.settings.items() if name != "kv_cache" or not learned}
        return {"quant_method": self.quant_method, **kept}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: there are no defaults to leave out."""
        return self.to_dict()


class VQCompressQuantizer(HfQuantizer):
    """Puts CompressedLinear modules in place before transformers loads their tensors by name."""

    requires_calibration = True
    # transformers before 5.21 does not say whose conversions it wants.
    _filled: PreTrainedModel

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from vqcompress.model.linear import keep_packed, replace_linears
        from vqcompress.model.weights import Names, check_headers

        self._filled = model
        entries = parse_entries(self.quantization_config.to_dict(), "the model")
        with torch.device("meta"):
            replace_linears(model, "", entries, model.dtype, keep_packed("auto", entries, model.dtype))
        stored = {n: info for file in checkpoint_files or () for n, info in Checkpoint.header(Path(file)).items()}
        check_headers(model, Names(model, stored), stored)
        if not entries:
            return
        # The marker that stops a process which forgot to import vqcompress is no news to one that did.
        known, first = set(model._keys_to_ignore_on_load_unexpected or ()), entries[0].target.name
        model._keys_to_ignore_on_load_unexpected = known | {
            # A checkpoint may spell names with a prefix of its own, and may store experts fused.
            rf"(^|\.){name}$"
            for name in (HINT, rf"{re.escape(first)}\.weight", rf"{re.escape(first.rsplit('.', 2)[0])}\.\w+")
        }

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """transformers' own, but experts that are compressed are not merged."""
        from vqcompress.model.experts import without_merges

        return without_merges(self._filled if model is None else model, weight_conversions)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` writes the stored parts back as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


def attach(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Let `save_pretrained` of a model that is compressed already write what loads again.

    settings: the `quantization_config` of its artifact.
    """
    model.config.quantization_config = VQCompressConfig(**settings)
    quantizer: Any = VQCompressQuantizer(model.config.quantization_config)
    model.hf_quantizer = quantizer


def register() -> None:
    """Make the format known to transformers; once."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(VQCompressConfig)
        register_quantizer(QUANT_METHOD)(VQCompressQuantizer)
