"""Error feedback: a weight is quantized a few columns at a time, and later columns correct the error of earlier ones.

Block LDLQ (QuIP#, arXiv 2402.04396, section 4.1; its d = 1 is GPTQ, arXiv 2210.17323; GPTVQ, arXiv 2402.15319, section
3, uses it with learned codebooks), written without an inverse. With H = B Bᵀ, B upper triangular, an error E costs
tr(E H Eᵀ) = |E B|² = Σ_g |E_g B_gg + Σ_{f<g} E_f B_fg|², and term g depends on the groups up to g only. So each group
in turn takes the codeword c whose image c B_gg is nearest to W_g B_gg + Σ_{f<g} E_f B_fg.

Shape legend: O output rows, I input columns, J columns padded to whole groups and in the order of encoding, d columns
of a group, G = J / d groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from vqcompress.methods.base import is_finite
from vqcompress.methods.hadamard import hadamard
from vqcompress.methods.statistics import Statistics

# Columns whose feedback is added in one product; inside a span it goes group by group.
SPAN = 128
# Rows or columns that are rotated at once.
STRIP = 4096
# Share of the mean diagonal that is added to the Hessian, where no option says another.
DAMPING = 0.01


class Quantizer(Protocol):
    """A search for codewords, or a grid."""

    def nearest(self, target_Od: Tensor, block_dd: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Codes, any shape, and values (O, d) whose images, value @ block, are near to the target.

        group: of the weight, not in the order of encoding.
        """


@dataclass(frozen=True)
class HessianFactor:
    """An error E of a weight with this input costs |E B|²; groups of columns are encoded in an order of their own.

    factor_JJ: upper triangular B with B Bᵀ = damped H / mean(diag H), float32; zero rows for padding. order_G: the
    group of the weight that is encoded g-th. d: columns of a group.
    """

    factor_JJ: Tensor
    order_G: Tensor
    d: int

    def blocks_Gdd(self) -> Tensor:
        """The diagonal blocks B_gg."""
        groups = len(self.order_G)
        return self.factor_JJ.view(groups, self.d, groups, self.d).diagonal(dim1=0, dim2=2).movedim(2, 0)


def factorize_hessian(
    statistics: Statistics,
    weight_OI: Tensor,
    d: int,
    feedback: bool,
    damping: float,
    ordered: bool = True,
    signs_I: Tensor | None = None,
) -> HessianFactor:
    """The factor of an input's Hessian if there is one and feedback is wanted; else of its diagonal; else of 1.

    ordered: the columns with the largest diagonal are encoded first. signs_I: of the input's rotation, if there is one.
    """
    columns, device = weight_OI.shape[1], weight_OI.device
    hessian_II = statistics.hessian_II if feedback else None
    if hessian_II is None:
        hessian_II = (torch.ones(columns) if statistics.sumsq_I is None else statistics.sumsq_I).diag()
    if not is_finite(hessian_II):
        raise ValueError("the statistics of the input hold NaN or Inf")
    # A wide input's Hessian takes tens of GB in float64: there are never more than two copies.
    hessian_JJ = hessian_II.to(device, torch.float64, copy=True)
    if signs_I is not None:
        _rotate(hessian_JJ, signs_I.to(hessian_JJ))
    if columns % d:
        hessian_JJ = pad(hessian_JJ, (0, -columns % d) * 2)
    # Later groups correct earlier ones, so the heavy ones come first ("act-order" in GPTQ's code). Nothing stored
    # depends on the order.
    weight_G = hessian_JJ.diagonal().reshape(-1, d).sum(1)
    order_G = weight_G.argsort(descending=True, stable=True) if ordered else torch.arange(len(weight_G), device=device)
    index_J = (order_G[:, None] * d + torch.arange(d, device=device)).flatten()
    # Read backwards: eliminating the last column first makes the factor upper triangular.
    hessian_JJ = hessian_JJ[index_J.flip(0)[:, None], index_J.flip(0)]
    factor_JJ = _factorize(hessian_JJ, damping).flip(0, 1).contiguous()
    factor_JJ[index_J >= columns] = 0
    return HessianFactor(factor_JJ, order_G, d)


def _rotate(hessian_II: Tensor, signs_I: Tensor) -> None:
    """Turn the Hessian into that of the rotated input, in place."""
    hessian_II *= signs_I[:, None]
    hessian_II *= signs_I
    for dim in (0, 1):
        for strip in hessian_II.split(STRIP, 1 - dim):
            strip.copy_(hadamard(strip, dim))


def _factorize(hessian_JJ: Tensor, damping: float) -> Tensor:
    """Lower triangular L, float32, with L Lᵀ = H / mean(diag H) + damping · 1; more damping while that is not definite.

    A Hessian of zeros counts as the identity. Channels that were never active weigh `damping`. H is overwritten.
    """
    mean, diagonal_J = hessian_JJ.diagonal().mean(), hessian_JJ.diagonal()
    if mean > 0:
        hessian_JJ /= mean
    else:
        hessian_JJ.zero_().diagonal().fill_(1)
    unit_J = diagonal_J.clone()
    while True:
        diagonal_J.copy_(unit_J + damping)
        lower_JJ, info = torch.linalg.cholesky_ex(hessian_JJ)
        if info == 0:
            # The rounding also hides the last bits of float64, which depend on the number of threads.
            return lower_JJ.float()
        damping *= 10


def ldlq(weight_OJ: Tensor, factor: HessianFactor, quantizer: Quantizer) -> tuple[list[Tensor], Tensor]:
    """The codes of every group and the values chosen for the weight, float32 (O, J), both in the order of encoding.

    weight_OJ: float32, padded to whole groups and in that order.
    """
    factor_JJ, d = factor.factor_JJ, factor.d
    error_OJ, value_OJ = torch.zeros_like(weight_OJ), torch.empty_like(weight_OJ)
    groups, codes = factor.order_G.tolist(), []
    for start in range(0, weight_OJ.shape[1], SPAN // d * d):
        end = min(start + SPAN // d * d, weight_OJ.shape[1])
        carry_OJ = error_OJ[:, :start] @ factor_JJ[:start, start:end]
        for at in range(start, end, d):
            group = slice(at, at + d)
            block_dd = factor_JJ[group, group]
            target_Od = weight_OJ[:, group] @ block_dd + carry_OJ[:, at - start : at - start + d]
            target_Od += error_OJ[:, start:at] @ factor_JJ[start:at, group]
            code, value_OJ[:, group] = quantizer.nearest(target_Od, block_dd, groups[at // d])
            error_OJ[:, group] = weight_OJ[:, group] - value_OJ[:, group]
            codes.append(code)
    return codes, value_OJ


@dataclass(frozen=True)
class Grid:
    """The quantizer of numbers that are each rounded by themselves, in steps of a scale.

    scale_OI: of every weight. rounded: the nearest codes of ratios to it, as floats.
    """

    scale_OI: Tensor
    rounded: Callable[[Tensor], Tensor]

    def nearest(self, target_Od: Tensor, block_dd: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Codes and values (O, 1) of a column."""
        scale_O1 = self.scale_OI[:, group : group + 1]
        code_O1 = self.rounded(target_Od / block_dd / scale_O1)
        return code_O1, code_O1 * scale_O1


def grid_codes(weight_OI: Tensor, statistics: Statistics, grid: Grid, signs_I: Tensor | None = None) -> Tensor:
    """The codes (O, I), as floats, of a weight that is rounded to a grid with error feedback.

    signs_I: of the input's rotation, if the weight is one of the rotated input. ValueError if the Hessian holds NaN or
    Inf.
    """
    factor = factorize_hessian(statistics, weight_OI, 1, True, DAMPING, True, signs_I)
    codes, _ = ldlq(weight_OI[:, factor.order_G], factor, grid)
    return torch.cat(codes, 1)[:, factor.order_G.argsort()]
