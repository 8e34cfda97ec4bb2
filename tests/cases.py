"""Shapes, weights and methods that tests and benchmarks share; a new method is an entry in `METHOD_CASES`.

A method that bounds its own error also has an entry in `ERROR_BOUNDS`, and one that rounds activations an entry in
`LINEAR_REFERENCES`. References are float64 and share no code with what they check.
Shape legend: T tokens, O output rows, I input columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vqcompress.methods import Method, PackedTensors, make
from vqcompress.methods.rotation import rotate
from vqcompress.methods.statistics import Accumulator, Statistics

Shape = tuple[int, int]

SHAPES: list[Shape] = [(1, 1), (1, 129), (129, 1), (64, 128), (130, 257)]
TOKENS = [0, 1, 129]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def generator(seed: int = 0) -> torch.Generator:
    """A CPU generator of random numbers."""
    return torch.Generator().manual_seed(seed)


def gaussian(shape: Shape, seed: int = 0) -> Tensor:
    """Float32 N(0, 1)."""
    return torch.randn(shape, generator=generator(seed))


def _outlier(shape: Shape) -> Tensor:
    weight_OI = gaussian(shape) * 0.02
    weight_OI[shape[0] // 2, shape[1] // 3] = -3e4
    return weight_OI


# Float32 weights by shape.
WEIGHTS: dict[str, Callable[[Shape], Tensor]] = {
    "gaussian": gaussian,
    "outlier": _outlier,
    "zeros": torch.zeros,
    "constant": lambda shape: torch.full(shape, 0.37),
    "tiny": lambda shape: gaussian(shape) * 1e-30,
    "one_row_zero": lambda shape: gaussian(shape).index_fill_(0, torch.tensor([0]), 0.0),
}


def inputs(tokens: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """x (T, I) with a loud channel; the first of several rows is zero, the last one 1000 times smaller."""
    x_TI = gaussian((tokens, columns), seed)
    x_TI[:, columns // 2] *= 30
    if tokens > 1:
        x_TI[0] = 0
        x_TI[-1] *= 1e-3
    return x_TI.to(dtype)


def statistics(columns: int) -> Statistics:
    """Every statistic of 200 tokens of `inputs`."""
    accumulator = Accumulator(frozenset({"absmax", "sumsq", "hessian", "sample"}), columns, total_tokens=200)
    for seed in (2, 3):
        accumulator.add(inputs(100, columns, seed=seed))
    return accumulator.statistics()


def _case(name: str, **options: object) -> tuple[str, Method]:
    return "-".join([name, *(f"{option}={value}" for option, value in options.items())]), make(name, options)


METHOD_CASES: list[tuple[str, Method]] = [
    _case("int8"),
    _case("int8", activations="per_tensor"),
    _case("fp8"),
    _case("int8", rotation=True),
    _case("int8", rotation=True, feedback=True),
    _case("fp8", power_of_two_scales=True),
    _case("fp8", feedback=True),
    # Few rounds of training: the laws hold for any codebook.
    _case("vq", iterations=3, codebook_updates=1),
    _case("vq", d=3, bits=5, scope="target", feedback=False, iterations=3, codebook_updates=1),
    _case("vq", d=8, bits=6, stages=2, beam=4, entry_bits=16, scope="target", iterations=3, codebook_updates=1),
    _case("vq", rotation=True, iterations=3, codebook_updates=1),
    _case("vq", codebook="trellis", state_bits=8),
    _case("vq", codebook="trellis", bits=3, state_bits=9, rotation=False),
]


def encoded(method: Method, weight_OI: Tensor, seed: int = 0) -> tuple[PackedTensors, PackedTensors]:
    """The tensors that `encode` returns, and those that `decode` takes: these and the shared ones."""
    shared: PackedTensors = {}
    known = statistics(weight_OI.shape[1])
    if method.shared_layout():
        shared = method.fit_shared([weight_OI], [known], generator(seed))
    stored = method.encode(weight_OI, known, generator(seed), shared)
    return stored, {**shared, **stored}


def tiles(scale_PJ: Tensor, shape: Shape) -> Tensor:
    """The 128×128 tile's scale of every element, by index arithmetic."""
    return scale_PJ[torch.arange(shape[0])[:, None] // 128, torch.arange(shape[1])[None, :] // 128]


def e4m3(value: Tensor) -> Tensor:
    """The nearest E4M3 value to each element of a float64 tensor, ties to even, saturating at ±448."""
    exponent = torch.frexp(value.abs().clamp_min(2.0**-6)).exponent - 1
    step = torch.exp2(exponent.double() - 3)
    return ((value / step).round() * step).clamp(-448, 448)


def _int8_bound(method: Method, weight_OI: Tensor, parts: PackedTensors) -> Tensor:
    # Half a step, and the float32 rounding of w / scale and of code · scale.
    return parts["scale"].double()[:, None] * 0.5 + weight_OI.double().abs() * 2.0**-22


def _fp8_bound(method: Method, weight_OI: Tensor, parts: PackedTensors) -> Tensor:
    scale_OI = tiles(parts["scale"], (weight_OI.shape[0], weight_OI.shape[1])).double()
    return torch.maximum(weight_OI.double().abs() * 2.0**-4, scale_OI * 2.0**-10) * (1 + 2.0**-18)


def is_bounded(method: Method) -> bool:
    """Whether the method bounds the error of each weight by itself: feedback and rotations do not."""
    options = method.model_dump()
    return method.name in ERROR_BOUNDS and not options["feedback"] and not options.get("rotation")


# |w − ŵ| per element, float64, that the method's docstring promises.
ERROR_BOUNDS: dict[str, Callable[[Method, Tensor, PackedTensors], Tensor]] = {
    "int8": _int8_bound,
    "fp8": _fp8_bound,
}


def _int8_linear(method: Method, x_TI: Tensor, parts: PackedTensors) -> Tensor:
    # The rotation has tests of its own; here its rounding would decide ties.
    x_TI = (rotate(x_TI, parts["signs"]) if "signs" in parts else x_TI).float()
    if "input_scale" in parts:
        scale_x = parts["input_scale"]
    else:
        # In float32: the scale and the ratio are rounded there by contract, and a tie decides a code.
        scale_x = (x_TI.abs().amax(1, keepdim=True) / 127).clamp_min(2.0**-126)
    codes_TI = (x_TI / scale_x).double().round().clamp(-127, 127)
    return (codes_TI * scale_x.double()) @ (parts["codes"].double() * parts["scale"].double()[:, None]).T


def _fp8_linear(method: Method, x_TI: Tensor, parts: PackedTensors) -> Tensor:
    x_TI = x_TI.float()
    rows, columns = parts["codes"].shape
    weight_OI = parts["codes"].double() * tiles(parts["scale"], (rows, columns)).double()
    rounded_TI = torch.zeros_like(x_TI, dtype=torch.float64)
    for i in range(0, x_TI.shape[1], 128):
        tile = x_TI[:, i : i + 128]
        scale = (tile.abs().amax(1, keepdim=True) / 448).clamp_min(2.0**-126)
        if method.model_dump().get("power_of_two_scales"):
            scale = torch.tensor([2.0 ** power_of_two_exponent(s) for s in scale.flatten().tolist()])[:, None]
        rounded_TI[:, i : i + 128] = e4m3((tile / scale).double()) * scale.double()
    return rounded_TI @ weight_OI.T


def power_of_two_exponent(scale: float) -> int:
    """The least e with 2**e ≥ scale."""
    mantissa, exponent = math.frexp(scale)
    return exponent - 1 if mantissa == 0.5 else exponent


# x Wᵀ in float64 with the activation rounded as the method rounds it; a method without an entry does not round it.
LINEAR_REFERENCES: dict[str, Callable[[Method, Tensor, PackedTensors], Tensor]] = {
    "int8": _int8_linear,
    "fp8": _fp8_linear,
}
