"""vLLM runs artifacts with our kernels: an out-of-tree quantization method, by the entry point `vllm.general_plugins`.

vLLM merges projections that read one input (`qkv_proj`, `gate_up_proj`) and passes each stored tensor of such a layer
with the id of its shard. Here a layer holds one module per stored projection, the CompressedLinear of every other
runtime, and concatenates their outputs, so the projections of a layer may differ in method.
Written against vLLM 0.33 and not yet run by a real engine (docs/serving.md). Only vLLM imports this module.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QuantizationConfig, register_quantization_config

from vqcompress.errors import VQCompressError
from vqcompress.model.linear import CompressedLinear, SharedParts
from vqcompress.storage.artifact import HINT, Entry, parse_entries, part_name
from vqcompress.storage.output import QUANT_METHOD

# The positions of vLLM's named shards in a merged layer; other shard ids are positions already.
POSITIONS = {"q": 0, "k": 1, "v": 2}
INSTEAD = "`vqcompress export` writes what vLLM reads by itself: --format fp8 from fp8 artifacts, dense from any"


def register() -> None:
    """Make the format known to vLLM, which calls this once in each of its processes."""
    register_quantization_config(QUANT_METHOD)(VQCompressConfig)


class VQCompressConfig(QuantizationConfig):
    """The `quantization_config` of an artifact. entries: by the names of the modules in vLLM's model.

    owners: the path of shared parts → the first target that reads them; vLLM's blocks have no module for shared parts,
    so they are loaded with this target. shared: the path → the module that holds them.
    """

    def __init__(self, entries: list[Entry]):
        super().__init__()
        self.entries = {entry.target.name: entry for entry in entries}
        self.owners = {entry.shared: entry.target.name for entry in reversed(entries) if entry.shared}
        self.shared: dict[str, SharedParts] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VQCompressConfig:
        """From config.json's JSON. VQCompressError if it is damaged, of another version, or compresses experts."""
        entries = parse_entries(config, "the model")
        for entry in entries:
            if re.search(r"\.experts\.\d+\.", entry.target.name):
                raise VQCompressError(f"{entry.target.name}: vqcompress runs no compressed experts in vLLM; {INSTEAD}")
        return cls(entries)

    def get_name(self) -> str:
        """The `quant_method` of artifacts."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The types of x that the kernels read."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """80: the kernels are compiled for sm_80 and later."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No files besides config.json."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the entries as vLLM's model renames its modules."""
        self.entries = hf_to_vllm_mapper.apply_dict(self.entries)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """VQCompressError for Llama-4: vLLM reorders rows of its plain weights while it loads them."""
        if str(getattr(hf_config, "model_type", "")).startswith("llama4"):
            raise VQCompressError(f"{model_name}: vqcompress does not run Llama-4 in vLLM; {INSTEAD}")

    def get_checkpoint_weight_mapper(self) -> Any:
        """Drops the marker HINT, and renames shared parts to parts of the weight that owns them.

        Static in vLLM's class, but called on the object. Names are matched by their ends, since loaders of inner
        models see them without a prefix.
        """
        from vllm.model_executor.models.utils import WeightsMapper

        renamed: dict[re.Pattern[str], str | None] = {re.compile(rf"^{HINT}$"): None}
        for path, owner in self.owners.items():
            block, _, number = path.rpartition(".shared_parts.")
            end = ".".join(block.split(".")[-2:])
            target = owner.removeprefix(block + ".")
            pattern = re.compile(rf"(^|\.){re.escape(end)}\.shared_parts\.{number}\.")
            renamed[pattern] = rf"\g<1>{end}.{target}.{part_name('weight', '')}"
        return WeightsMapper(orig_to_new_regex=renamed)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """VQCompressLinear for a linear layer with a compressed projection, else vLLM's own method."""
        if not isinstance(layer, LinearBase):
            return None
        parent, _, leaf = prefix.rpartition(".")
        names = [prefix]
        if prefix not in self.entries and leaf in self.packed_modules_mapping:
            names = [f"{parent}.{part}" for part in self.packed_modules_mapping[leaf]]
        entries = [self.entries.get(name) for name in names]
        return VQCompressLinear(self, prefix, entries) if any(entries) else UnquantizedLinearMethod()


class VQCompressLinear(LinearMethodBase):
    """The method of one layer of vLLM.

    entries: of its stored projections in order, None for a dense one. unloaded: a tensor's name and the position of its
    projection → the memory to load it into.
    """

    def __init__(self, config: VQCompressConfig, prefix: str, entries: list[Entry | None]):
        self.config, self.prefix, self.entries = config, prefix, entries
        self.unloaded: dict[tuple[str, int], Tensor] = {}

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer its `shards`, and an empty parameter per stored name, whose `weight_loader` fills them."""
        if isinstance(layer, QKVParallelLinear) and len(self.entries) == 1:
            # The rows may alternate from head to head; vLLM's models have code of their own for that.
            raise VQCompressError(f"{self.prefix}: queries, keys and values are one compressed matrix; {INSTEAD}")
        sizes = output_partition_sizes if len(self.entries) > 1 else [sum(output_partition_sizes)]
        layer.shards = nn.ModuleList(
            self._shard(position, entry, (size, input_size_per_partition), params_dtype)
            for position, (entry, size) in enumerate(zip(self.entries, sizes, strict=True))
        )
        # `weight` is the name of a dense projection and of the marker tensor.
        for name in sorted({"weight", *(name for name, _ in self.unloaded)}):
            parameter = nn.Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = partial(self._load, name)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def _shard(self, position: int, entry: Entry | None, shape: tuple[int, int], dtype: torch.dtype) -> nn.Module:
        """The module of a projection, with memory that is still to be loaded."""
        if entry is None:
            linear = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype).requires_grad_(False)
            self.unloaded["weight", position] = linear.weight
            return linear
        if entry.target.shape != shape:
            raise VQCompressError(
                f"{self.prefix} is stored as {entry.target.shape}, vLLM asks for {shape}: compressed weights are not "
                f"split; run with --tensor-parallel-size 1. {INSTEAD}"
            )
        device, shared = torch.empty(0).device, None
        if entry.shared is not None:
            shared = self.config.shared.setdefault(entry.shared, SharedParts(entry).to_empty(device=device))
        # vLLM's layer holds the bias.
        shard = CompressedLinear(replace(entry, target=replace(entry.target, bias=False)), dtype, shared)
        shard.to_empty(device=device)
        owned = shared is None or self.config.owners[str(entry.shared)] == entry.target.name
        for part, tensor in shard.parts().items():
            if owned or part in entry.layout():
                self.unloaded[part_name("weight", part), position] = tensor
        return shard

    def _load(self, name: str, parameter: Tensor, loaded: Tensor, shard_id: int | str | None = None) -> None:
        """The `weight_loader` of the stored tensors with this name below the layer."""
        position: Any = 0 if shard_id is None else POSITIONS.get(str(shard_id), shard_id)
        memory = self.unloaded.pop((name, position), None)
        if memory is None and name == "weight":
            # The marker tensor.
            return
        if memory is None or memory.shape != loaded.shape:
            needed = memory if memory is None else tuple(memory.shape)
            raise VQCompressError(f"{self.prefix}: {name} of shard {shard_id!r} is {tuple(loaded.shape)}, not {needed}")
        memory.copy_(loaded)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Prepare what the products read. VQCompressError if the checkpoint lacked a tensor."""
        for name, position in self.unloaded:
            raise VQCompressError(f"{self.prefix}: the checkpoint has no {name} for its shard {position}")
        for shard in layer.shards:
            if isinstance(shard, CompressedLinear):
                shard.prepare(layer.params_dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (…, I) → (…, O), the outputs of the shards side by side."""
        y = torch.cat([shard(x) for shard in layer.shards], dim=-1)
        return y if bias is None else y + bias
