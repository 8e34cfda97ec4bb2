"""A model's skeleton without memory, and tensors put into it under the names of a checkpoint.

The renamings and merges of a checkpoint's names (per-expert tensors into fused experts, a missing prefix) are
transformers' own, so what loads there loads here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from vqcompress.errors import VQCompressError, nearest
from vqcompress.model.experts import without_merges
from vqcompress.model.linear import CompressedLinear, SharedParts
from vqcompress.storage.checkpoint import TensorInfo, read_json
from vqcompress.storage.trust import reason, trusted

# Four times what DeepSeek-V3 has where every expert is a module: 58 layers of 256 experts with 3 matrices.
MAX_PARAMETERS = 200_000
CAUSAL_ONLY = "only causal language models can be compressed, those that AutoModelForCausalLM loads"


def load_config(path: Path) -> transformers.PretrainedConfig:
    """The transformers config of a directory; VQCompressError if it is of no causal language model."""
    stated = read_json(path / "config.json")
    name = stated.get("model_type") if isinstance(stated, dict) and "auto_map" not in stated else None
    if isinstance(name, str) and name not in CONFIG_MAPPING:
        near = nearest(name, CONFIG_MAPPING, 0.7)
        hint = f"did you mean '{near}'?" if near else "a newer one may: pip install --upgrade transformers"
        raise VQCompressError(
            f"{path}: transformers {transformers.__version__} has no model_type '{name[:40]}'; {hint}"
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trusted())
        if not all(isinstance(name, str) for name in config.architectures or []):
            raise ValueError(f"architectures {str(config.architectures)[:40]} are no names")
    except Exception as error:  # the validators of its configs have error types of their own
        raise VQCompressError(f"transformers cannot read the config of {path}: {reason(error)}") from error
    if not _is_causal(config):
        name = next(iter(config.architectures or []), config.model_type)
        raise VQCompressError(f"{path}: {name} is {_other_kind(config)}; {CAUSAL_ONLY}")
    return config


def _is_causal(config: transformers.PretrainedConfig) -> bool:
    """Whether a config is one of a causal language model, or of one with more around it, in transformers' own lists."""
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return True
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    if "text_config" in type(config).sub_configs:
        return True
    # A decoder with its own encoder, or with another head or none, shares the type: only the name of the class tells.
    names = config.architectures or []
    known = getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "__name__", "")
    decodes = getattr(config, "is_decoder", True) and not config.is_encoder_decoder
    # Without a head a model is whole where the head is the embedding; some of Bloom and GPT-2 are stored so.
    ends = ("ForCausalLM", "LMHeadModel", *(["Model"] if decodes and config.tie_word_embeddings else []))
    return any(name == known or name.endswith(ends) for name in names) or not (names or config.is_encoder_decoder)


def _other_kind(config: transformers.PretrainedConfig) -> str:
    """What a model is that is no causal language model, for an error."""
    text = getattr(config, "text_config", None)
    if text is not None:
        known = type(text) in MODEL_FOR_CAUSAL_LM_MAPPING
        return "a multimodal model" + (
            f" (save its {text.model_type} part by itself to compress that)" if known else ""
        )
    if config.is_encoder_decoder:
        return "an encoder-decoder"
    # The class of the type could be built, with a head of random weights.
    shared = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return f"a {config.model_type} model{' without a head that predicts the next token' if shared else ''}"


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty` takes no memory. Parameters start as such; accelerate moves them only once they are there.

    The experts of one layer of a large mixture are 30 GB, which a laptop that only plans does not have. Buffers are
    computed, so they stay real. MAX_PARAMETERS ends what would never be done.
    """

    made = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
            self.made += 1
            if self.made > MAX_PARAMETERS:
                raise ValueError(f"it has more than {MAX_PARAMETERS:,} parameters")
        return func(*args, **kwargs)


def skeleton(config: transformers.PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config in eval mode: parameters on the meta device, buffers (rotary tables …) real."""
    # A quantization_config would make transformers look for a quantizer; the caller swaps modules itself.
    config = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    try:
        with init_empty_weights(include_buffers=False), _EmptyOnMeta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusted())
    except Exception as error:  # sizes that do not fit together fail in as many ways as there are models
        raise VQCompressError(f"no causal language model can be built from this config: {reason(error)}") from error
    # On the meta device every parameter was made anew, tied ones too.
    model.tie_weights()
    return model.eval()


class Names:
    """Which parameter of a model each tensor of a checkpoint becomes.

    parameter: checkpoint name → the model's name (of the merged parameter, where several become one).
    tensor: the model's name → checkpoint name, for those that are stored one to one.
    """

    def __init__(self, model: PreTrainedModel, checkpoint_names: Iterable[str]):
        mapping = without_merges(model, get_model_conversion_mapping(model))
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        known = model.state_dict()
        self.parameter: dict[str, str] = {}
        self.tensor: dict[str, str] = {}
        for name in checkpoint_names:
            renamed, merged = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
            if renamed not in known and name in known:
                renamed, merged = name, None
            self.parameter[name] = renamed
            if merged is None:
                self.tensor[renamed] = name

    def under(self, prefix: str) -> list[str]:
        """The checkpoint names of what belongs to a module."""
        return [name for name, parameter in self.parameter.items() if parameter.startswith(prefix + ".")]

    def on_disk(self, name: str) -> str:
        """The name on disk of a parameter, of a part of a weight, or of a part that a block shares."""
        if part := re.fullmatch(r"(.+\.weight)_(\w+)", name):
            return f"{self.tensor[part[1]]}_{part[2]}"
        if shared := re.fullmatch(r"(.+)(\.shared_parts\..+)", name):
            return self.stored_prefix(shared[1]) + shared[2]
        return self.tensor[name]

    def stored_prefix(self, prefix: str) -> str:
        """A module's path as the checkpoint spells it, which may lack the model's prefix."""
        for parameter, name in self.tensor.items():
            below = parameter.removeprefix(prefix)
            if parameter.startswith(prefix + ".") and name.endswith(below):
                return name.removesuffix(below)
        return prefix


def check_parts(model: nn.Module, names: Names, tensors: dict[str, TensorInfo]) -> None:
    """Compare what is stored for compressed layers, by its headers, with what their methods will read.

    model: with these layers in place and not filled yet. VQCompressError naming a part of another type or shape (a
    kernel would look up beyond its end), or one that no method asks for (without it the weight is another one).
    """
    stored = {p: m for p, m in model.named_modules() if isinstance(m, (CompressedLinear, SharedParts))}
    seen: dict[str, str] = {}
    for name, info in tensors.items():
        path, _, part = names.parameter[name].rpartition(".")
        # The marker lies under `weight`.
        if path not in stored or part in ("weight", "bias"):
            continue
        layout = stored[path]._buffers.get(part)
        if layout is None:
            raise VQCompressError(f"{name} is stored, but config.json does not say what for")
        if (info.dtype, info.shape) != (layout.dtype, layout.shape):
            found, asked = f"{info.dtype} {info.shape}", f"{layout.dtype} {tuple(layout.shape)}"
            raise VQCompressError(f"{name} is {found}; the method that config.json names stores {asked}")
        if (other := seen.setdefault(f"{path}.{part}", name)) != name:
            raise VQCompressError(f"{name} and {other} are both stored; only one of them can be meant")


def assign(model: PreTrainedModel, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Put tensors, under their checkpoint names, into a model's meta parameters, in the types those have."""
    mapping: Any = without_merges(model, get_model_conversion_mapping(model))
    load = LoadStateDictConfig(weight_mapping=mapping, dtype=dtype)
    # transformers shows a bar for every call, and a streaming run makes one call a block.
    was_on = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        info, _ = convert_and_load_state_dict_in_model(model, tensors, load)
    finally:
        if was_on:
            transformers.utils.logging.enable_progress_bar()
    if info.mismatched_keys:
        name, *shapes = sorted(info.mismatched_keys, key=str)[0]
        raise VQCompressError(
            f"{name} has the shape {tuple(shapes[0])} on disk, the config asks for {tuple(shapes[1])}"
        )
    if info.conversion_errors or info.error_msgs:
        raise VQCompressError(f"a weight cannot be loaded: {next(iter(info.conversion_errors), info.error_msgs)}")


def finish_loading(model: PreTrainedModel, module: nn.Module, prefix: str, device: torch.device) -> None:
    """Move a filled module to its device; VQCompressError naming a parameter that the checkpoint did not have."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.device.type == "meta":
            raise VQCompressError(f"the checkpoint has no tensor for {prefix + name}")
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.to(device)
