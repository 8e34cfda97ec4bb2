"""Facts about the activation that enters a weight, gathered over the calibration rows.

Statistics belong to an *input*, not to a weight: q, k and v read the same tensor and share one object.
Shape legend: T tokens, I input channels, S sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SAMPLE_TOKENS = 1024


@dataclass(frozen=True)
class Statistics:
    """What a method may know about the input of the weight that it encodes; a field nobody asked for is None.

    seed: random state that belongs to the input, so that all weights that read it are rotated by the same signs.
    tokens: number of calibration tokens seen. own_tokens: how many of them this input really saw, if the others were
    borrowed from inputs like it; else None. routed: tokens that a router sent to this expert, 0 for other inputs.
    absmax_I: largest magnitude per channel, float32.
    sumsq_I: mean square per channel, float32 (the diagonal of the Hessian).
    hessian_II: XᵀX / tokens, float32 (GPTQ, arXiv 2210.17323, section 2: half the Hessian of the squared error). Where
    tokens have weights w, these two are Xᵀ diag(w) X / Σw and its diagonal.
    sample_SI: some of the inputs themselves, float32, at most about `SAMPLE_TOKENS`.
    """

    seed: int | None = None
    tokens: int = 0
    absmax_I: Tensor | None = None
    sumsq_I: Tensor | None = None
    hessian_II: Tensor | None = None
    sample_SI: Tensor | None = None
    own_tokens: int | None = None
    routed: int = 0

    @property
    def seen(self) -> int:
        """Tokens that this input really saw."""
        return self.tokens if self.own_tokens is None else self.own_tokens

    @property
    def outlier(self) -> float | None:
        """The largest magnitude of the loudest channel over that of the median one; None if unknown."""
        active = None if self.absmax_I is None else self.absmax_I[self.absmax_I > 0]
        return None if active is None or not len(active) else round((active.max() / active.median()).item(), 3)

    def divided(self, s_I: Tensor) -> Statistics:
        """The statistics of x / s."""
        return replace(
            self,
            absmax_I=None if self.absmax_I is None else self.absmax_I / s_I,
            sumsq_I=None if self.sumsq_I is None else self.sumsq_I / s_I.square(),
            hessian_II=None if self.hessian_II is None else self.hessian_II / s_I[:, None] / s_I[None, :],
            sample_SI=None if self.sample_SI is None else self.sample_SI / s_I,
        )

    def proxy_error(self, weight_OI: Tensor, decoded_OI: Tensor) -> float | None:
        """tr((W−Ŵ)H(W−Ŵ)ᵀ) / tr(WHWᵀ), the share of the output's energy that is lost; None without H and a sample."""
        energies = []
        for matrix_OI in (weight_OI - decoded_OI, weight_OI):
            if self.hessian_II is not None:
                each = (matrix_OI @ self.hessian_II) * matrix_OI
            elif self.sample_SI is not None:
                each = (self.sample_SI @ matrix_OI.T).square().mean(0)
            else:
                return None
            energies.append(each.sum(dtype=torch.float64).item())
        return energies[0] / max(energies[1], 1e-30)


class Accumulator:
    """Adds up the `Statistics` of one input over batches, in bounded memory.

    sums: name → the running maximum (absmax, float32) or total (sumsq and hessian, float64). Sums of a batch are
    float32, those over batches float64: the totals, rounded to float32, do not depend on the order.
    sample: every k-th token of the run, so it is the same whatever the batch size; None if not needed.
    mass: the sum of the tokens' weights. routed: tokens that a router sent.
    before: tokens counted by processes of lower rank; None if that number is unknown: k then counts from the start of
    each batch.
    """

    def __init__(
        self,
        needs: frozenset[str],
        channels: int,
        total_tokens: int,
        device: torch.device | str = "cpu",
        before: int | None = 0,
    ):
        shapes = {"absmax": (channels,), "sumsq": (channels,), "hessian": (channels, channels)}
        self.sums = {
            name: torch.zeros(shapes[name], dtype=torch.float32 if name == "absmax" else torch.float64, device=device)
            for name in sorted(needs - {"sample"})
        }
        self.needs, self.before, self.device = needs, before, device
        self.tokens, self.mass, self.routed = 0, 0.0, 0
        self.sample: list[Tensor] | None = [] if "sample" in needs else None
        self.stride = max(1, -(-total_tokens // SAMPLE_TOKENS))

    def add(self, x: Tensor, weight_T: Tensor | None = None) -> None:
        """Count the inputs x (…, I), any float type. weight_T: the weight of each in means; 1 by default."""
        x_TI = x.detach().reshape(-1, x.shape[-1]).float()
        weighted_TI = x_TI if weight_T is None else x_TI * weight_T.sqrt()[:, None]
        if "absmax" in self.sums and len(x_TI):
            torch.maximum(self.sums["absmax"], x_TI.abs().amax(0), out=self.sums["absmax"])
        if "sumsq" in self.sums:
            self.sums["sumsq"] += weighted_TI.square().sum(0)
        if "hessian" in self.sums:
            self.sums["hessian"] += weighted_TI.T @ weighted_TI
        if self.sample is not None:
            start = 0 if self.before is None else -(self.before + self.tokens) % self.stride
            self.sample.append(x_TI[start :: self.stride].clone())
        self.tokens += len(x_TI)
        self.mass += len(x_TI) if weight_T is None else weight_T.sum(dtype=torch.float64).item()

    def merge(self, other: Accumulator) -> None:
        """Add the totals of another accumulator of a similar input; totals that only one of them has do not change."""
        for name in self.sums.keys() & other.sums.keys():
            combine = torch.maximum if name == "absmax" else torch.add
            combine(self.sums[name], other.sums[name], out=self.sums[name])
        if self.sample is not None and other.sample is not None:
            self.sample += other.sample
        self.tokens, self.mass = self.tokens + other.tokens, self.mass + other.mass

    def statistics(self, seed: int | None = None) -> Statistics:
        """The totals so far; means are over `tokens`, by their weights. seed: of the input."""
        means = {name: (total / (self.mass or 1.0)).float() for name, total in self.sums.items() if name != "absmax"}
        sample_SI = torch.cat(self.sample) if self.sample else None
        if sample_SI is not None:
            # Only samples merged from many inputs can be too long.
            sample_SI = sample_SI[:: max(1, len(sample_SI) // SAMPLE_TOKENS)]
        return Statistics(
            seed=seed,
            tokens=self.tokens,
            absmax_I=self.sums.get("absmax"),
            sumsq_I=means.get("sumsq"),
            hessian_II=means.get("hessian"),
            sample_SI=sample_SI,
            routed=self.routed,
        )
