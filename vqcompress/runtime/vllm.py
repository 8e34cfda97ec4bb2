"""vLLM runs artifacts with our kernels: an out-of-tree quantization method, by the entry point `vllm.general_plugins`.

vLLM merges projections that read one input (`qkv_proj`, `gate_up_proj`) and hands over each stored tensor of such a
layer with the id of its shard. A layer here holds one module for each stored projection, the CompressedLinear of every
other runtime, and puts their outputs behind one another: projections may differ in method, and no formula is here.
Written against vLLM 0.33 and untested on a real one until it has been (docs/serving.md). Only vLLM imports this module.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QuantizationConfig, register_quantization_config

from vqcompress.errors import VQCompressError
from vqcompress.model.linear import CompressedLinear, SharedParts
from vqcompress.storage.artifact import HINT, QUANT_METHOD, Entry, parse_entries, part_name

# The places of vLLM's shard ids in a merged layer; others are numbers already.
PLACES = {"q": 0, "k": 1, "v": 2}
WAY_OUT = "`vqcompress export` writes what vLLM reads by itself: --format fp8 from fp8 artifacts, dense from any"

Loader = Callable[..., None]


def register() -> None:
    """Make the format known to vLLM; as often as it calls, which is once in each of its processes."""
    register_quantization_config(QUANT_METHOD)(VQCompressConfig)


class VQCompressConfig(QuantizationConfig):
    """The `quantization_config` of an artifact. entries: by the names that vLLM's model has for the modules."""

    def __init__(self, entries: list[Entry]):
        super().__init__()
        self.entries = {entry.target.name: entry for entry in entries}
        # vLLM's blocks have no module for what their targets share: it is loaded with the first target that reads it.
        self.owners: dict[str, str] = {}
        for entry in entries:
            if entry.shared is not None:
                self.owners.setdefault(entry.shared, entry.target.name)
        self.shared: dict[str, SharedParts] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VQCompressConfig:
        """Of config.json's JSON. VQCompressError if it is damaged, of another version, or compresses experts."""
        entries = parse_entries(config, "the model")
        for entry in entries:
            if re.search(r"\.experts\.\d+\.", entry.target.name):
                raise VQCompressError(f"{entry.target.name}: vqcompress runs no compressed experts in vLLM; {WAY_OUT}")
        return cls(entries)

    def get_name(self) -> str:
        """The `quant_method` of the artifact."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What the kernels take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPU that the kernels are compiled for, sm_80."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: config.json holds all."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the entries as vLLM's model renames its modules."""
        self.entries = hf_to_vllm_mapper.apply_dict(self.entries)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """VQCompressError for an architecture whose rows vLLM puts into another order while it loads plain weights."""
        if str(getattr(hf_config, "model_type", "")).startswith("llama4"):
            raise VQCompressError(f"{model_name}: vqcompress does not run Llama-4 in vLLM; {WAY_OUT}")

    def get_checkpoint_weight_mapper(self) -> Any:
        """Drops the marker that names no module; shared parts become parts of the weight that owns them.

        Static in vLLM's class, but called on the object. Names are matched by their ends: loaders of inner models see
        them without a prefix.
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
        """Ours for a linear layer any of whose stored projections is compressed; vLLM's own for everything else."""
        if not isinstance(layer, LinearBase):
            return None
        parent, _, leaf = prefix.rpartition(".")
        names = [prefix]
        if prefix not in self.entries and leaf in self.packed_modules_mapping:
            names = [f"{parent}.{part}" for part in self.packed_modules_mapping[leaf]]
        entries = [self.entries.get(name) for name in names]
        return VQCompressLinear(self, prefix, entries) if any(entries) else UnquantizedLinearMethod()

    def shared_parts(self, entry: Entry, device: torch.device) -> SharedParts | None:
        """The module of what an entry shares with others of its block, the same for all of them."""
        if entry.shared is None:
            return None
        if entry.shared not in self.shared:
            self.shared[entry.shared] = SharedParts(entry).to_empty(device=device)
        return self.shared[entry.shared]


class VQCompressLinear(LinearMethodBase):
    """The method of one layer of vLLM. entries: of its stored projections in order, None for one that is dense."""

    def __init__(self, config: VQCompressConfig, prefix: str, entries: list[Entry | None]):
        self.config, self.prefix, self.entries = config, prefix, entries
        # What is still to be loaded: by name, by the place of its projection.
        self.waiting: dict[str, dict[int, Tensor]] = {}

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
        """Give the layer its `shards`, and for each name in the checkpoint an empty parameter that loads into them."""
        if isinstance(layer, QKVParallelLinear) and len(self.entries) == 1:
            # Whose rows may alternate from head to head; for plain weights each of vLLM's models has code for that.
            raise VQCompressError(f"{self.prefix}: queries, keys and values are one compressed matrix; {WAY_OUT}")
        sizes = output_partition_sizes if len(self.entries) > 1 else [sum(output_partition_sizes)]
        wanted = [(size, input_size_per_partition) for size in sizes]
        stored = [entry.target.shape if entry else shape for entry, shape in zip(self.entries, wanted, strict=False)]
        if stored != wanted or len(sizes) != len(self.entries):
            raise VQCompressError(
                f"{self.prefix} is stored as {stored}, vLLM asks for {wanted}: compressed weights are not split; "
                f"run with --tensor-parallel-size 1. {WAY_OUT}"
            )
        device = torch.empty(0).device
        layer.shards = nn.ModuleList(
            self._shard(place, entry, shape, params_dtype, device)
            for place, (entry, shape) in enumerate(zip(self.entries, wanted, strict=True))
        )
        # Under the plain name comes a dense projection, or the marker for loaders that do not know the format.
        for name in sorted({"weight", *self.waiting}):
            slots = self.waiting.get(name)
            of_type = next(iter(slots.values())).dtype if slots else params_dtype
            parameter = nn.Parameter(torch.empty(0, dtype=of_type), requires_grad=False)
            parameter.weight_loader = self._loader(name)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def _shard(
        self, place: int, entry: Entry | None, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> nn.Module:
        """The module of a projection, in memory that waits to be loaded."""
        if entry is None:
            linear = nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=dtype).to_empty(device=device)
            self.waiting.setdefault("weight", {})[place] = linear.weight.requires_grad_(False)
            return linear
        shared = self.config.shared_parts(entry, device)
        # vLLM's layer holds the bias.
        own = replace(entry, target=replace(entry.target, bias=False))
        shard = CompressedLinear(own, dtype, shared).to_empty(device=device)
        parts = {part_name("weight", part): shard.get_buffer(part_name("weight", part)) for part in own.layout()}
        if shared is not None and self.config.owners[str(entry.shared)] == entry.target.name:
            parts |= {part_name("weight", part): buffer for part, buffer in shared.named_buffers()}
        for name, buffer in parts.items():
            self.waiting.setdefault(name, {})[place] = buffer
        return shard

    def _loader(self, name: str) -> Loader:
        """What vLLM calls for each stored tensor that has this name below the layer."""

        def load(parameter: Tensor, loaded: Tensor, shard_id: int | str | None = None) -> None:
            place = 0 if shard_id is None and len(self.entries) == 1 else PLACES.get(str(shard_id), shard_id)
            slot = self.waiting.get(name, {}).pop(place, None)  # type: ignore[arg-type]
            if slot is None and name != "weight":
                raise VQCompressError(f"{self.prefix}: nothing waits for a {name} of shard {shard_id!r}")
            if slot is None:
                return
            if slot.shape != loaded.shape or (name != "weight" and slot.dtype != loaded.dtype):
                found, need = (f"{t.dtype} {tuple(t.shape)}" for t in (loaded, slot))
                raise VQCompressError(f"{self.prefix}: {name} of shard {shard_id!r} is {found}; it must be {need}")
            slot.data.copy_(loaded)

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Prepare what the products read. VQCompressError if the checkpoint lacked a part."""
        for name, places in self.waiting.items():
            if places:
                raise VQCompressError(f"{self.prefix}: the checkpoint has no {name} for its shards {sorted(places)}")
        for shard in layer.shards:
            if isinstance(shard, CompressedLinear):
                shard.prepare(layer.params_dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (…, I) → (…, O), the outputs of the shards behind one another."""
        outputs = [shard(x) for shard in layer.shards]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return y if bias is None else y + bias
