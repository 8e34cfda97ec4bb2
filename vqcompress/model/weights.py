"""A model's skeleton without memory, and tensors put into it under the names of a checkpoint.

The renamings and merges of a checkpoint's names (per-expert tensors into fused experts, a missing prefix) are
transformers' own, so what loads there loads here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from vqcompress.errors import VQCompressError
from vqcompress.model.experts import without_merges
from vqcompress.model.linear import CompressedLinear, SharedParts
from vqcompress.storage.artifact import part_name
from vqcompress.storage.checkpoint import COMPUTED, TensorInfo
from vqcompress.storage.damage import other_kind
from vqcompress.storage.trust import reason, trusted


def load_config(path: Path) -> transformers.PretrainedConfig:
    """The transformers config of a directory; VQCompressError unless it belongs to a causal language model.

    Without its `quantization_config`, which would make transformers look for a quantizer, and without a wish for tuples
    in place of named outputs.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trusted())
        for part in (config, config.get_text_config()):
            vars(part).pop("quantization_config", None)
        return_logits(config)
        known = auto_class(config)
    except Exception as error:  # the validators of its configs have error types of their own
        raise VQCompressError(f"transformers cannot read the config of {path}: {reason(error)}") from error
    if known is None:
        name = next(iter(config.architectures or []), config.model_type)
        # Without its head, a model is whole where the head is the embedding.
        config.tie_word_embeddings = True
        tie = ' (without a head: only with "tie_word_embeddings": true in config.json)' if auto_class(config) else ""
        raise VQCompressError(f"{path}: {name} is no causal language model that AutoModelForCausalLM loads{tie}")
    return config


def return_logits(config: transformers.PretrainedConfig) -> None:
    """Let a model of the config return its logits by name and nothing that it returns only where a config asks."""
    for part in (config, config.get_text_config()):
        part.return_dict, part.output_hidden_states, part.output_attentions = True, False, False


def auto_class(config: transformers.PretrainedConfig) -> Any:
    """The class of transformers that loads the checkpoint of a config as the language model that it is, or None.

    AutoModelForCausalLM, or AutoModelForImageTextToText for models with a tower that the former does not know.
    """
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if auto.__name__ in (getattr(config, "auto_map", None) or {}):
            return auto
        if type(config) in auto._model_mapping and not config.is_encoder_decoder and _fits(config, auto):
            return auto
    return None


def _fits(config: transformers.PretrainedConfig, auto: Any) -> bool:
    """Whether the class that a config names is the language model of its type, and no classifier or encoder."""
    # Encoders and models with another head share the type, so the name of the class decides. A model that was saved
    # without a head is complete where the head is the embedding.
    tied = getattr(config, "tie_word_embeddings", False) and getattr(config, "is_decoder", True)
    headless = ["Model"] if tied or "text_config" in type(config).sub_configs else []
    known: Any = auto._model_mapping[type(config)]
    classes = [cls.__name__ for cls in (known if isinstance(known, tuple) else (known,))]
    ends = (*classes, "ForCausalLM", "LMHeadModel", "ForConditionalGeneration", *headless)
    return not config.architectures or any(name.endswith(ends) for name in config.architectures)


class _EmptyOnMeta(TorchFunctionMode):
    """Gives `torch.empty` no memory.

    accelerate moves a parameter to the meta device only once it exists, and the experts of one layer of a large mixture
    take 30 GB. Buffers are computed, so they stay real.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def skeleton(config: transformers.PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config in eval mode: parameters on the meta device, buffers (rotary tables …) real."""
    try:
        with init_empty_weights(include_buffers=False), _EmptyOnMeta():
            auto = auto_class(config) or AutoModelForCausalLM
            model = auto.from_config(config, dtype=dtype, trust_remote_code=trusted())
    except Exception as error:  # sizes that do not fit together fail in as many ways as there are models
        raise VQCompressError(f"no causal language model can be built from this config: {reason(error)}") from error
    # Moving to the meta device makes every parameter anew, tied ones too.
    model.tie_weights()
    return model.eval()


class Names:
    """The parameter of a model that each tensor of a checkpoint becomes.

    parameter: checkpoint name → name in the model (of the merged parameter, where several tensors become one).
    tensor: name in the model → checkpoint name, for parameters that are stored as one tensor.
    parts: names in the model of parameters that are stored together, in one tensor.
    tied: name in the model of a parameter → that of the one that it shares its values with.
    """

    def __init__(self, model: PreTrainedModel, checkpoint_names: Iterable[str]):
        mapping = without_merges(model, get_model_conversion_mapping(model))
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        known = model.state_dict()
        # A prefix is there or not, which `stored_prefix` sees.
        self._renamings, self._known, self.tied = renamings, known, dict(model.all_tied_weights_keys)
        self._back: Any = [m.reverse_transform() for m in reversed(renamings) if type(m) is WeightRenaming]
        self.parameter: dict[str, str] = {}
        self.tensor: dict[str, str] = {}
        self.parts: set[str] = set()
        split = {source: c.target_patterns for c in converters for source in c.source_patterns}
        for name in checkpoint_names:
            renamed, merged = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
            if renamed not in known and name in known:
                renamed, merged = name, None
            self.parameter[name] = renamed
            if merged is None:
                self.tensor[renamed] = name
            elif len(targets := split.get(merged, [])) > 1:
                self.parts |= {renamed.replace(targets[0], target) for target in targets}

    def under(self, prefix: str) -> list[str]:
        """The checkpoint names of a module's tensors."""
        return [name for name, parameter in self.parameter.items() if parameter.startswith(prefix + ".")]

    def held(self, weight: str) -> str:
        """Why packed tensors cannot take the place of a weight, by its name in the model; "" if they can."""
        if weight in self.tied or weight in self.tied.values():
            return "several modules share it"
        if weight in self.parts:
            return "the checkpoint stores it and others as one tensor"
        # Of a checkpoint without weights only a plan is made.
        if weight not in self._known or not self.tensor:
            return ""
        if (name := self.tensor.get(weight)) is None:
            return "transformers makes it of several tensors"
        alone, part = (apply_renamings(n, self._renamings) for n in (name, part_name(name, "codes")))
        return "" if part == part_name(alone, "codes") else "its name in the checkpoint is not that of a weight"

    def on_disk(self, name: str) -> str:
        """The name on disk of a parameter, of a packed tensor, or of a packed tensor that a block shares."""
        if part := re.fullmatch(r"(.+\.weight)_(\w+)", name):
            return f"{self.tensor[part[1]]}_{part[2]}"
        if shared := re.fullmatch(r"(.+)(\.shared_parts\..+)", name):
            return self.stored_prefix(shared[1]) + shared[2]
        return self.tensor[name]

    def original(self, parameter: str) -> str:
        """The name by which checkpoints store a parameter that transformers renames, whether this one does or not."""
        path, _, name = parameter.rpartition(".")
        if parameter in self.tensor:
            return self.tensor[parameter]
        if (renamed := apply_renamings(parameter, self._back)) == parameter:
            return f"{self.stored_prefix(path)}.{name}"
        # Read backwards, several prefixes may lead to one: the checkpoint's is that of what lies beside.
        sibling = next((k for parent in _parents(path) for k in self.tensor if k.startswith(parent + ".")), "")
        wrong, right = apply_renamings(sibling, self._back), self.tensor.get(sibling, "")
        while wrong and wrong[-1:] == right[-1:]:
            wrong, right = wrong[:-1], right[:-1]
        return right + renamed.removeprefix(wrong) if renamed.startswith(wrong) else renamed

    def stored_prefix(self, prefix: str) -> str:
        """A module's path as the checkpoint spells it, or what lies beside the module there."""
        for parent in _parents(prefix):
            for parameter, name in self.tensor.items():
                below = parameter.removeprefix(parent)
                if parameter.startswith(parent + ".") and name.endswith(below):
                    return name.removesuffix(below) + prefix.removeprefix(parent)
        return prefix


def _parents(path: str) -> Iterator[str]:
    """A module's path and those that it lies in, the nearest first."""
    return (path.rsplit(".", n)[0] for n in range(path.count(".") + 1))


def check_headers(model: PreTrainedModel, names: Names, tensors: dict[str, TensorInfo]) -> None:
    """Compare the headers of stored tensors with what the model, packed layers in place, will read.

    VQCompressError naming a tensor that is missing or has another shape; or a packed tensor of another type (a kernel
    would read beyond its end) or that no method reads (without it the weight would be another one); or, where nothing
    is packed, one that shows that the weights are not dense. Without any tensors a model can still be planned.
    """
    asked, vocab = model.state_dict(), (getattr(model.config.get_text_config(), "vocab_size", 0),)
    # These may tell of what kind the checkpoint is.
    odd = [name for name, parameter in names.parameter.items() if parameter not in asked]
    rows = {tensors[n].shape[:1] for n, p in names.parameter.items() if p in asked and asked[p].shape[:1] == vocab}
    packed = {path for path, m in model.named_modules() if isinstance(m, (CompressedLinear, SharedParts))}
    for name, parameter in names.parameter.items():
        path, _, part = parameter.rpartition(".")
        # Under `weight` a packed layer may have the marker for programs that do not know the format.
        is_packed = path in packed and part not in ("weight", "bias")
        if is_packed and parameter not in asked:
            raise VQCompressError(f"{name} is stored, but config.json does not say what for")
        found, wanted = tensors[name], asked.get(parameter)
        # Tensors that are merged into one parameter have shapes of their own.
        if wanted is None or parameter not in names.tensor:
            continue
        if found.shape != wanted.shape:
            why = f"config.json says {tuple(wanted.shape)}{other_kind('tensors', odd, name)}"
            # Only where the embedding and the head agree.
            if rows == {found.shape[:1]} and wanted.shape == (*vocab, *found.shape[1:]):
                why += f'; set "vocab_size": {found.shape[0]} there if these are the right weights'
            raise VQCompressError(f"{name} has the shape {found.shape}, {why}")
        if is_packed and found.dtype != wanted.dtype:
            raise VQCompressError(f"{name} is stored as {found.dtype}, config.json asks for {wanted.dtype}")
    if tensors and (missing := _missing(model, names)):
        head = None if names.tied else getattr(model.get_output_embeddings(), "weight", None)
        is_head = head is not None and dict(model.named_parameters()).get(missing[0]) is head
        tie = ': set "tie_word_embeddings": true in config.json if the head is the embedding' if is_head else ""
        like = (f", but {name}: save the model without its wrapper" for name in odd if name.endswith(missing[0]))
        kind = other_kind("tensors", odd) or other_kind("no head" if is_head else "no body", odd)
        raise VQCompressError(f"the checkpoint has no tensor for {missing[0]}{kind or next(like, tie)}")
    if not packed:
        _check_dense(model, names, tensors)


def _check_dense(model: PreTrainedModel, names: Names, tensors: dict[str, TensorInfo]) -> None:
    """VQCompressError naming a tensor without which, or in whose type, a module would compute something else.

    Whole modules that the model lacks change nothing: draft layers, value heads, towers of other media. Nor do tensors
    that transformers ignores, which hold what a config says.
    """
    asked, buffers = model.state_dict(), dict(model.named_buffers())
    ignored = re.compile("|".join([COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ())]))
    for name, parameter in names.parameter.items():
        dtype = tensors[name].dtype
        if parameter in asked:
            if asked[parameter].is_floating_point() and (dtype.itemsize < 2 or not dtype.is_floating_point):
                why = f"is stored as {dtype}, and config.json has no quantization_config for it"
                raise VQCompressError(f"{name} {why}{other_kind('tensors', tensors, name)}")
        elif parameter not in buffers and not ignored.search(parameter):
            # A model saved without its head has names without the prefix.
            for path in (parameter, f"{model.base_model_prefix}.{parameter}"):
                holder = _deepest(model, path)
                if not isinstance(holder, (PreTrainedModel, nn.ModuleList, nn.ModuleDict)):
                    why = f"{name} has no place in the model's {type(holder).__name__}: these are not the dense weights"
                    raise VQCompressError(f"{why} that config.json describes{other_kind('tensors', tensors, name)}")


def _deepest(module: nn.Module, path: str) -> nn.Module:
    """The innermost module that a path leads to."""
    for part in path.split("."):
        if (inner := module._modules.get(part)) is None:
            break
        module = inner
    return module


def _missing(model: PreTrainedModel, names: Names) -> list[str]:
    """The parameters and stored buffers of a model for which a checkpoint has no tensor, not even a tied one."""
    # One tensor of those that are tied is enough.
    source, ignored = model.all_tied_weights_keys, list(model._keys_to_ignore_on_load_missing or ())
    stored = {source.get(name, name) for name in (*names.parameter.values(), *names.parts)}
    wanted = (name for name in model.state_dict() if source.get(name, name) not in stored)
    return [name for name in wanted if not any(re.search(pattern, name) for pattern in ignored)]


def tie_weights(model: PreTrainedModel, names: Names) -> None:
    """Tie what a config says is tied, once loaded, unless the checkpoint has another tensor for either, as transformers
    does."""
    # It resizes biases, which inference mode forbids.
    with torch.inference_mode(False), torch.no_grad():
        model.tie_weights(missing_keys=model.state_dict().keys() - names.parameter.values(), recompute_mapping=False)


def assign(model: PreTrainedModel, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Put tensors, under their checkpoint names, into a model's meta parameters, in the types those have."""
    mapping: Any = without_merges(model, get_model_conversion_mapping(model))
    settings = LoadStateDictConfig(weight_mapping=mapping, dtype=dtype)
    info, _ = convert_and_load_state_dict_in_model(model, tensors, settings)
    if failed := [*info.mismatched_keys, *info.conversion_errors.items(), *info.error_msgs]:
        raise VQCompressError(f"a weight cannot be loaded: {failed[0]}")


def finish_loading(model: PreTrainedModel, module: nn.Module, prefix: str, device: torch.device) -> None:
    """Move a filled module to its device; VQCompressError naming a parameter that the checkpoint did not have."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.device.type == "meta":
            raise VQCompressError(f"the checkpoint has no tensor for {prefix + name}")
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.to(device)
