"""As much of vLLM as the plugin touches, for machines on which vLLM does not run: signatures and contracts of 0.33.0.

Each class has the name, the bases and, for what plugins call or override, the signatures of vLLM's own; bodies are the
part that one GPU needs, in our words. `install` puts the modules in place.
"""

from __future__ import annotations

import itertools
import re
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

CUSTOMIZED: dict[str, type] = {}


class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer: torch.nn.Module, *weight_args, **extra_weight_attrs): ...

    @abstractmethod
    def apply(self, layer: torch.nn.Module, *args, **kwargs) -> torch.Tensor: ...

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return


class LinearMethodBase(QuantizeMethodBase):
    @abstractmethod
    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ): ...

    @abstractmethod
    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor: ...


class QuantizationConfig(ABC):
    _ignore_unexpected_suffixes = (".q_scale", ".k_scale", ".v_scale")

    def __init__(self):
        super().__init__()
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self): ...

    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]: ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...

    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig: ...

    @abstractmethod
    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None: ...

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        return WeightsMapper(orig_to_new_suffix={".g_idx": None})

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper):  # noqa: B027
        pass

    def maybe_update_config(  # noqa: B027
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ):
        pass


def register_quantization_config(quantization: str):
    def wrapper(cls):
        assert issubclass(cls, QuantizationConfig)
        CUSTOMIZED[quantization] = cls
        return cls

    return wrapper


@dataclass
class WeightsMapper:
    """Patterns first, then stacked names, prefixes and suffixes; None drops a tensor."""

    orig_to_new_regex: dict[re.Pattern, str | None] = field(default_factory=dict)
    orig_to_new_stacked: dict[str, tuple[str, Any]] = field(default_factory=dict)
    orig_to_new_prefix: dict[str, str | None] = field(default_factory=dict)
    orig_to_new_suffix: dict[str, str | None] = field(default_factory=dict)

    def __or__(self, other: WeightsMapper) -> WeightsMapper:
        return WeightsMapper(*(getattr(self, key) | getattr(other, key) for key in self.__dataclass_fields__))

    def _map(self, key: str) -> tuple[str, Any] | None:
        for pattern, new in self.orig_to_new_regex.items():
            if pattern.search(key):
                if new is None:
                    return None
                key = pattern.sub(new, key)
        shard = None
        for part, (new, new_shard) in self.orig_to_new_stacked.items():
            if part in key:
                key, shard = key.replace(part, new, 1), new_shard
        for prefix, new in self.orig_to_new_prefix.items():
            if key.startswith(prefix):
                if new is None:
                    return None
                key = key.replace(prefix, new, 1)
        for suffix in self.orig_to_new_suffix:
            if key.endswith(suffix):
                return None
        return key, shard

    def apply(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        for name, tensor in weights:
            mapped = self._map(name)
            if mapped is not None:
                if mapped[1] is not None:
                    tensor.shard_id = mapped[1]
                yield mapped[0], tensor

    def apply_dict(self, values: dict[str, Any]) -> dict[str, Any]:
        return {mapped[0]: value for name, value in values.items() if (mapped := self._map(name)) is not None}

    def get_rename_mapper(self) -> WeightsMapper:
        return WeightsMapper(orig_to_new_prefix=self.orig_to_new_prefix)


class AutoWeightsLoader:
    """Follows names through the tree of modules; what is neither a module nor a parameter there is an error."""

    def __init__(self, module: nn.Module):
        self.module = module

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, mapper: WeightsMapper | None = None) -> set[str]:
        mapper = mapper or WeightsMapper()
        configs = (m.quant_config for m in (self.module, *self.module.children()) if hasattr(m, "quant_config"))
        if config := next(configs, None):
            mapper |= config.get_checkpoint_weight_mapper()
        return set(self._load_module("", self.module, mapper.apply(weights)))

    def _load_module(self, base: str, module: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterable[str]:
        if module is not self.module and callable(load := getattr(module, "load_weights", None)):
            yield from (f"{base}.{name}" for name in load(weights))
            return
        children, parameters = dict(module.named_children()), dict(module.named_parameters(recurse=False))
        split = ((name.partition("."), tensor) for name, tensor in weights)
        for first, group in itertools.groupby(split, key=lambda each: each[0][0]):
            below = ((parts[2], tensor) for parts, tensor in group)
            if first in children:
                yield from self._load_module(f"{base}.{first}".lstrip("."), children[first], below)
            elif first in parameters:
                for _, tensor in below:
                    parameters[first].weight_loader(parameters[first], tensor)
                    yield f"{base}.{first}"
            else:
                raise ValueError(f"There is no module or parameter named {base}.{first}")


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self,
        layer,
        input_size_per_partition,
        output_partition_sizes,
        input_size,
        output_size,
        params_dtype,
        **extra_weight_attrs,
    ):
        weight = Parameter(torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype))
        weight.output_dim, weight.weight_loader = 0, extra_weight_attrs["weight_loader"]
        layer.register_parameter("weight", weight)

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    tp_size = 1

    def __init__(self, input_size, output_sizes, bias, params_dtype, quant_config, prefix):
        super().__init__()
        self.output_partition_sizes = [size // self.tp_size for size in output_sizes]
        self.params_dtype = params_dtype
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=input_size,
            output_partition_sizes=self.output_partition_sizes,
            input_size=input_size,
            output_size=sum(output_sizes),
            params_dtype=params_dtype,
            weight_loader=self.weight_loader,
        )
        self.register_parameter("bias", None)
        if bias:
            self.bias = Parameter(torch.empty(sum(self.output_partition_sizes), dtype=params_dtype))
            self.bias.output_dim, self.bias.weight_loader = 0, self.weight_loader

    def weight_loader(self, param: Parameter, loaded_weight: torch.Tensor, loaded_shard_id=None):
        place = {"q": 0, "k": 1, "v": 2, None: 0}.get(loaded_shard_id, loaded_shard_id)
        sizes = self.output_partition_sizes
        param.data.narrow(param.output_dim, sum(sizes[:place]), sizes[place]).copy_(loaded_weight)

    def forward(self, x):
        return self.quant_method.apply(self, x, self.bias), None


class ColumnParallelLinear(LinearBase):
    pass


class RowParallelLinear(LinearBase):
    pass


class MergedColumnParallelLinear(ColumnParallelLinear):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        for name, tensor in weights:
            parameter = getattr(self, name, self)
            parameter.weight_loader(parameter, tensor, getattr(tensor, "shard_id", None))
            yield name


class QKVParallelLinear(MergedColumnParallelLinear):
    """vLLM's is a ColumnParallelLinear with the same `load_weights`."""


def install(patch: pytest.MonkeyPatch) -> None:
    """Let imports of vLLM find this module."""
    layers = "vllm.model_executor.layers"
    for name in ("vllm", "vllm.model_executor", layers, "vllm.model_executor.models"):
        package = types.ModuleType(name)
        package.__path__ = []
        patch.setitem(sys.modules, name, package)
    for name in (f"{layers}.linear", f"{layers}.quantization", "vllm.model_executor.models.utils"):
        patch.setitem(sys.modules, name, sys.modules[__name__])
