"""The modules that replace linear layers in a compressed model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vqcompress.errors import Fallback, UsageError, VQCompressError
from vqcompress.methods import PackedTensors
from vqcompress.model.device import available_bytes
from vqcompress.model.experts import unfuse
from vqcompress.model.projections import form_of
from vqcompress.storage.artifact import SMOOTHING, Entry, part_name

# The share of free memory that decoded weights may take on a CPU.
SPARE = 0.8


class _Packed(nn.Module):
    """A module whose buffers are packed tensors: they move between devices but never change their type."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Packed:
        stored = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, part in stored.items():
            moved = self._buffers[name]
            # `model.to(torch.bfloat16)` is about the arithmetic; a rounded scale would change the weight.
            if part is not None and moved is not None and moved.dtype != part.dtype:
                self._buffers[name] = part.to(moved.device)
        return self


class SharedParts(_Packed):
    """Packed tensors that several targets of a block share, as buffers under their own names."""

    def __init__(self, entry: Entry):
        super().__init__()
        for name, (dtype, shape) in entry.method.shared_layout().items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))


class CompressedLinear(_Packed):
    """y = method.linear(x / smoothing) + bias, from packed tensors.

    They are buffers `weight_PART`, as stored, and are never changed. The first call on a device prepares the tensors
    that the method's `linear` reads, for instance the decoded weight. packed: never decode ahead of a call on a CPU.
    """

    def __init__(self, entry: Entry, bias_dtype: torch.dtype, shared: SharedParts | None, packed: bool = False):
        super().__init__()
        self.packed = packed
        self.entry = entry
        self.out_features, self.in_features = entry.target.shape
        for name, (dtype, shape) in entry.layout().items():
            self.register_buffer(part_name("weight", name), torch.empty(shape, dtype=dtype, device="meta"))
        empty = torch.empty(self.out_features, dtype=bias_dtype, device="meta")
        self.bias = nn.Parameter(empty, requires_grad=False) if entry.target.bias else None
        # In a tuple, so that torch does not list the block's parts once more under every layer.
        self._shared = (shared,)
        self._prepared: PackedTensors | None = None
        self._prepared_for = bias_dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedLinear:
        self._prepared = None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._prepared = None
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """The decoded weight, for code that reads a layer's `weight`."""
        return self.decoded().to(self._prepared_for)

    def keeps_parts(self, device: torch.device) -> bool:
        """Whether products on a device read the packed tensors and not a weight that was decoded once."""
        return self.packed if device.type == "cpu" else self.entry.method.has_kernel(self.entry.target.shape)

    def view_part(self, name: str, part: Tensor) -> None:
        """Replace a packed tensor by one of the same values, so that memory holds them once."""
        self._prepared = None
        if (buffer := part_name("weight", name)) in self._buffers:
            self._buffers[buffer] = part

    def parts(self) -> PackedTensors:
        """The packed tensors by name, shared ones included."""
        own = {name: self.get_buffer(part_name("weight", name)) for name in self.entry.layout()}
        shared = dict(self._shared[0].named_buffers()) if self._shared[0] is not None else {}
        return own | shared

    def decoded(self) -> Tensor:
        """The decoded weight (O, I) in float32, smoothing undone."""
        return self.entry.decode(self.parts())

    def prepare(self, dtype: torch.dtype) -> PackedTensors:
        """The tensors that `linear` reads for inputs of a type, made once."""
        if self._prepared is None or self._prepared_for != dtype:
            # Tensors made in inference mode, as inside of `generate`, could never be used with autograd.
            with torch.inference_mode(False), torch.no_grad():
                parts = self.parts()
                smoothing = parts.pop(SMOOTHING, None)
                prepared = self.entry.method.prepare(parts, self.entry.target.shape, dtype, self.packed)
                if smoothing is not None:
                    prepared[SMOOTHING] = smoothing.to(dtype)
            self._prepared, self._prepared_for = prepared, dtype
        return self._prepared

    def forward(self, x: Tensor) -> Tensor:
        """x (…, I) → (…, O), in the type of x."""
        prepared = self.prepare(x.dtype)
        x_TI = x.reshape(-1, self.in_features)
        if SMOOTHING in prepared:
            x_TI = x_TI / prepared[SMOOTHING]
        y_TO = self.entry.method.linear(x_TI, prepared, self.entry.target.shape)
        if self.bias is not None:
            y_TO = y_TO + self.bias
        return y_TO.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The layer in `print(model)`."""
        return f"{self.in_features}, {self.out_features}, {self.entry.method!r}"


def unfuse_for(root: nn.Module, entries: Iterable[Entry]) -> None:
    """Replace fused experts of a model by single layers if entries name any of their matrices."""
    names = {entry.target.name for entry in entries}
    if isinstance(root, PreTrainedModel) and names - dict(root.named_modules()).keys():
        unfuse(root)


def keep_packed(cpu_weights: str, entries: Iterable[Entry], dtype: torch.dtype) -> bool:
    """Whether layers on a CPU decode at every call: `packed`, or `auto` where the decoded weights would not fit."""
    if cpu_weights not in ("auto", "dense", "packed"):
        raise UsageError(f"--cpu-weights {cpu_weights}: choose auto, dense or packed")
    # Some methods decode to float32 even for a model in 16 bits.
    decoded = sum(entry.target.weights for entry in entries) * max(dtype.itemsize, 4)
    if cpu_weights != "auto" or decoded <= SPARE * available_bytes():
        return cpu_weights == "packed"
    warnings.warn(
        f"{decoded:,} bytes of decoded weights do not fit: every call decodes, slowly", Fallback, stacklevel=2
    )
    return True


def replace_linears(
    root: nn.Module, prefix: str, entries: Iterable[Entry], dtype: torch.dtype, packed: bool = False
) -> None:
    """Replace the linear layers that entries name by CompressedLinear on the meta device, in place.

    root: a model or a block. prefix: of the entries' names, to be removed for paths below root; ends in a dot.
    dtype: of the biases. packed: see CompressedLinear.
    VQCompressError naming an entry that is no linear layer of the model.
    """
    entries = list(entries)
    unfuse_for(root, entries)
    modules = dict(root.named_modules())
    for entry in entries:
        path = entry.target.name.removeprefix(prefix)
        form = form_of(modules[path]) if path in modules else None
        if form is None or form[:2] != (entry.target.shape, entry.target.bias):
            raise VQCompressError(f"{entry.target} is not a linear layer of the model that config.json describes")
        shared = None if entry.shared is None else _shared_parts(root, entry.shared.removeprefix(prefix), entry)
        root.set_submodule(path, CompressedLinear(entry, dtype, shared, packed))


def decode_layers(model: nn.Module, kept: Collection[str] = ()) -> None:
    """Replace compressed layers by plain ones of the decoded weights, which have gradients and exact activations.

    kept: names of the targets that stay.
    """
    for path, layer in list(model.named_modules()):
        if isinstance(layer, CompressedLinear) and layer.entry.target.name not in kept:
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(layer.weight, requires_grad=False)
            plain.register_parameter("bias", layer.bias)
            model.set_submodule(path, plain)


def _shared_parts(root: nn.Module, path: str, entry: Entry) -> SharedParts:
    """The SharedParts at `BLOCK.shared_parts.K`, made for the first entry that asks for it."""
    block, _, key = f".{path}".rsplit(".", 2)
    holder: Any = root.get_submodule(block[1:])
    if not hasattr(holder, "shared_parts"):
        holder.shared_parts = nn.ModuleDict()
    if key not in holder.shared_parts:
        holder.shared_parts[key] = SharedParts(entry)
    found: SharedParts = holder.shared_parts[key]
    return found
