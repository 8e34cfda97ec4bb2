"""SmoothQuant: an exact rewrite of W x that moves outliers from an input into the weights that read it.

Shape legend: O output rows, I input channels, R rows of the producer that the factors fold into (R = I but for
grouped-query attention, where several inputs of o_proj come from one row of v_proj), S sampled tokens.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from vqcompress.methods import Method
from vqcompress.methods.statistics import Statistics

Place = Literal["fold", "runtime", "none"]
Strength = Annotated[float, Field(ge=0, le=1)]


class Smoothing(BaseModel):
    """The options of SmoothQuant (arXiv 2211.10438, section 4): W x = (W diag s)(diag(1/s) x).

    alpha: the migration strength, 0 to 1, or "auto" to take per input the one of `grid` (or no smoothing at all) whose
    quantized output is nearest to the dense one on calibration rows. norm, attention, mlp: where 1/s goes if the
    input comes from a normalization, from attention (v_proj → o_proj) or from inside the MLP (up_proj →
    down_proj): `fold` it into the producer where that is proven exact and else apply it at run time, always apply it
    at `runtime`, or `none` (no smoothing there).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    alpha: Strength | Literal["auto"] = "auto"
    grid: tuple[Strength, ...] = Field((0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), min_length=1)
    norm: Place = "fold"
    attention: Place = "none"
    mlp: Place = "none"

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that fitting asks for."""
        return frozenset({"absmax", "sample"} if self.alpha == "auto" else {"absmax"})


def smoothing_factors(absmax_I: Tensor, weight_absmax_I: Tensor, alpha: float) -> Tensor:
    """s_j = max|X_j|^α / max|W_j|^(1−α), (I,) float32 (arXiv 2211.10438, equation 4).

    A channel that is never active, or that no weight reads, keeps 1.
    """
    x, w = absmax_I.float(), weight_absmax_I.float()
    s = x.clamp(min=1e-5).pow(alpha) / w.clamp(min=1e-5).pow(1 - alpha)
    return torch.where((x > 0) & (w > 0), s.clamp(min=1e-5), torch.ones_like(s))


def tied_max(values_I: Tensor, rows_I: Tensor, rows: int) -> Tensor:
    """The largest of the values (I,) of each of R rows. rows_I: the row of each value."""
    return values_I.new_zeros(rows).scatter_reduce(0, rows_I.to(values_I.device), values_I, "amax")


def output_error(
    weights: list[Tensor], methods: list[Method], statistics: Statistics, s_I: Tensor, generator: torch.Generator
) -> float:
    """Σ ‖XWᵀ − Q(X/s, Ws)‖² / ‖XWᵀ‖² over the weights (O, I) that read one input, on the sampled rows."""
    x_SI = statistics.sample_SI
    assert x_SI is not None
    smoothed, error = statistics.divided(s_I), 0.0
    for weight_OI, method in zip(weights, methods, strict=True):
        shape = (weight_OI.shape[0], weight_OI.shape[1])
        scaled = weight_OI * s_I
        shared = method.fit_shared([scaled], [smoothed], generator) if method.shared_layout() else {}
        parts = shared | method.encode(scaled, smoothed, generator, shared)
        exact = x_SI @ weight_OI.T
        output = method.linear(x_SI / s_I, method.prepare(parts, shape), shape)
        error += ((exact - output).square().sum() / exact.square().sum().clamp(min=1e-30)).item()
    return error


def fit_smoothing(
    smoothing: Smoothing,
    weights: list[Tensor],
    methods: list[Method],
    statistics: Statistics,
    rows_I: Tensor,
    powers_of_two: bool,
    seed: int,
    few_tokens: bool = False,
) -> tuple[Tensor, float | None]:
    """The factors s (R,) for an input, and the α that made them; None if no smoothing had the least output error.

    weights, methods: of every target that reads the input. rows_I: the producer's row of each input channel; channels
    of one row share a factor. powers_of_two: round the factors to these, because a tensor that they multiply is stored
    in a 16-bit type. few_tokens: the calibration rows hold hardly any different tokens: a channel that is quiet there
    may be loud elsewhere, so that no magnitude counts as less than the median.
    """
    assert statistics.absmax_I is not None
    rows = int(rows_I.max()) + 1
    absmax_R = tied_max(statistics.absmax_I, rows_I, rows)
    absmax_R = absmax_R.clamp(min=absmax_R.median()) if few_tokens else absmax_R
    weight_absmax_R = tied_max(torch.stack([w.abs().amax(0) for w in weights]).amax(0), rows_I, rows)

    def factors(alpha: float) -> Tensor:
        s_R = smoothing_factors(absmax_R, weight_absmax_R, alpha)
        return s_R.log2().round().exp2() if powers_of_two else s_R

    if smoothing.alpha != "auto":
        return factors(smoothing.alpha), smoothing.alpha
    candidates: list[tuple[Tensor, float | None]] = [(torch.ones_like(absmax_R), None)]
    candidates += [(factors(alpha), alpha) for alpha in smoothing.grid]
    errors = [
        output_error(weights, methods, statistics, s_R[rows_I], torch.Generator().manual_seed(seed))
        for s_R, _ in candidates
    ]
    return candidates[errors.index(min(errors))]
