"""What scripts/tune.py, bench_kernels.py and kernel_resources.py look at: layer shapes, ways to store, and caches.

Codes are random bytes, which every format but FP8 can decode; what they stand for does not matter to a clock.
Shape legend: T rows, or tokens of a cache, O outputs, I inputs, E experts; B, Q, H, D, d as in `codebooks.kv`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqcompress.kv_cache import codes as kv
from vqcompress.methods import Method, PackedTensors, make
from vqcompress.methods.fp8 import reference as fp8_ref
from vqcompress.methods.int8 import reference as int8_ref
from vqcompress.methods.vq import reference as product
from vqcompress.methods.vq.base import stored

Shape = tuple[int, int]
# (O, I) of the linear layers of models that people run.
SHAPES: dict[str, list[Shape]] = {
    "Llama-2-7B": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "Llama-3-8B": [(1024, 4096), (14336, 4096), (4096, 14336)],
    "Llama-3-70B": [(8192, 8192), (28672, 8192), (8192, 28672)],
}
# (E, O, I) of the experts of a mixture, and how many a token has.
EXPERTS: dict[str, tuple[list[tuple[int, int, int]], int]] = {
    "DeepSeek-V3": ([(256, 2048, 7168), (256, 7168, 2048)], 8),
    "Qwen3-30B-A3B": ([(128, 768, 2048), (128, 2048, 768)], 8),
}
# What is asked of the kernels first.
ROWS = (1, 16, 4096, 4, 64, 512)
TINY: dict[str, list[Shape]] = {"tiny": [(96, 128), (64, 256)]}
TINY_EXPERTS: dict[str, tuple[list[tuple[int, int, int]], int]] = {"tiny": ([(5, 64, 128)], 2)}


@dataclass(frozen=True)
class Case:
    """A way to store weights. method: a recipe's, with its knobs."""

    name: str
    method: Method

    def parts(self, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> PackedTensors:
        """What `linear` reads, with random codes."""
        draw = torch.Generator(device).manual_seed(seed) if device.type != "meta" else None
        layout = self.method.layout(shape) | self.method.shared_layout()
        parts = {name: _random(name, *facts, device, draw) for name, facts in layout.items()}
        return self.method.prepare(parts, shape, dtype, packed=True)

    def stacked(self, experts: int, shape: Shape, device: torch.device, dtype: torch.dtype) -> PackedTensors:
        """The parts of so many experts behind one another; they repeat after four, in copies of their own."""
        four = [self.parts(shape, device, dtype, seed) for seed in range(min(experts, 4))]
        return {name: torch.stack([four[e % 4][name] for e in range(experts)]) for name in four[0]}

    def bytes(self, shape: Shape) -> int:
        """Of the parts of a weight."""
        return sum(torch.Size(size).numel() * dtype.itemsize for dtype, size in self.method.layout(shape).values())


def _random(
    name: str, dtype: torch.dtype, size: tuple[int, ...], device: torch.device, draw: torch.Generator | None
) -> Tensor:
    if device.type == "meta":
        return torch.empty(size, dtype=dtype, device=device)
    if dtype == torch.float8_e4m3fn:
        return fp8_ref.to_e4m3(torch.randn(size, device=device, generator=draw) * 100)
    if dtype.is_floating_point:
        return (torch.rand(size, device=device, generator=draw) + 0.5).to(dtype) * (1e-2 if name == "scale" else 1)
    low, high = (-127, 128) if dtype == torch.int8 else (0, 256)
    return torch.randint(low, high, size, device=device, generator=draw, dtype=torch.int16).to(dtype)


CASES = [
    Case(name, make(method, knobs))
    for name, method, knobs in (
        ("int8", "int8", {}),
        ("fp8", "fp8", {}),
        ("learned 2x8", "vq", {"d": 8, "bits": 8, "stages": 2}),
        ("learned 4,8", "vq", {}),
        ("trellis 2", "vq", {"codebook": "trellis"}),
        ("trellis 3", "vq", {"codebook": "trellis", "bits": 3}),
        ("trellis 4", "vq", {"codebook": "trellis", "bits": 4}),
    )
]


def random_rows(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """x (T, I)."""
    if device.type == "meta":
        return torch.empty((rows, columns), dtype=dtype, device=device)
    return torch.randn((rows, columns), device=device, generator=torch.Generator(device).manual_seed(1)).to(dtype)


def by_kernel(case: Case, route: str = "") -> Callable[[Tensor, PackedTensors, Shape], Tensor]:
    """x (T, I), parts, (O, I) → (T, O) by the kernels, also where operators would run their reference.

    route: see `product.on_gpu`.
    """
    from vqcompress.methods.fp8 import kernel as fp8
    from vqcompress.methods.int8 import kernel as int8

    method: Any = case.method
    if method.name == "int8":
        return lambda x, parts, shape: int8.linear(x, parts["codes"], parts["scale"], None)
    if method.name == "fp8":
        return lambda x, parts, shape: fp8.linear(x, parts["codes"], parts["scale"], method.power_of_two_scales)
    return lambda x, parts, shape: product.on_gpu(x, *stored(parts), method.form.name, None, route)


def grouped_by_kernel(case: Case) -> Callable[[Tensor, Tensor, PackedTensors], Tensor]:
    """x (S, I) sorted by expert, the ends of their rows (E,), parts of all experts → (S, O) by the kernels."""
    from vqcompress.methods.fp8 import kernel as fp8
    from vqcompress.methods.int8 import kernel as int8

    method: Any = case.method
    if method.name == "int8":
        return lambda x, ends, parts: int8.linear(x, parts["codes"], parts["scale"], None, ends)
    if method.name == "fp8":
        return lambda x, ends, parts: fp8.linear(x, parts["codes"], parts["scale"], method.power_of_two_scales, ends)
    return lambda x, ends, parts: product.on_gpu(x, *stored(parts), method.form.name, ends)


def reference(case: Case, x_TI: Tensor, parts: PackedTensors, shape: Shape) -> Tensor:
    """x Wᵀ in float32 by plain torch on the device of x, from the decoded weight and, of int8 and fp8, x as rounded."""
    method: Any = case.method
    x = x_TI.float()
    if method.name == "vq":
        return product.reference(x, *stored(parts), method.form)
    if method.name == "fp8":
        x = fp8_ref.fp8_rounded(x, method.power_of_two_scales)
    else:
        scale_T1 = (x.abs().amax(1, keepdim=True) / int8_ref.INT8_MAX).clamp_min(int8_ref.SCALE_MIN)
        x = (x / scale_T1).round().clamp(-int8_ref.INT8_MAX, int8_ref.INT8_MAX) * scale_T1
    return x @ method.decode(parts, shape).T


@dataclass(frozen=True)
class Cache:
    """Coded keys and values of one layer. turned: keys were coded before their rotary embedding."""

    batch: int
    queries: int
    heads: int
    tokens: int
    channels: int = 128
    d: int = 4
    turned: bool = False

    def parts(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[Any, ...]:
        """The arguments of `attend`."""
        draw = torch.Generator(device).manual_seed(seed) if device.type != "meta" else None

        def normal(*shape: int) -> Tensor:
            return (
                torch.empty(shape, device=device) if draw is None else torch.randn(shape, device=device, generator=draw)
            )

        groups, of = self.channels // self.d, (self.batch, self.heads, self.tokens)
        codes = [_random("codes", torch.uint8, (*of, groups), device, draw) for _ in range(2)]
        books = [normal(self.heads, groups, kv.ENTRIES, self.d).half() for _ in range(2)]
        angle_BTD = normal(1, self.tokens, self.channels // 2).repeat(1, 1, 2)
        angles = [angle_BTD.cos().to(dtype), angle_BTD.sin().to(dtype)] if self.turned else []
        q_BQD = normal(self.batch, self.queries, self.channels).to(dtype)
        return q_BQD, codes, books, angles, 0, self.tokens, self.channels**-0.5

    def bytes(self) -> int:
        """Of the codes of keys and values, and the codebooks."""
        codes = self.batch * self.tokens * self.channels // self.d
        return 2 * self.heads * (codes + kv.ENTRIES * self.channels * 2)


SIZES = [(batch, 32, heads, tokens) for tokens in (4096, 32768) for heads in (32, 8) for batch in (1, 8)]
CACHES = [Cache(*size, turned=turned) for turned in (False, True) for size in SIZES]
TINY_CACHES = [Cache(2, 4, heads, 40, 64, d, turned) for heads in (4, 2) for d, turned in ((4, False), (8, True))]
