"""Error feedback: a weight is quantized a few columns at a time, and later columns correct the error of earlier ones.

Block LDLQ (QuIP#, arXiv 2402.04396, section 4.1; its d = 1 is GPTQ, arXiv 2210.17323; GPTVQ, arXiv 2402.15319, section
3, uses it with learned codebooks), written without an inverse. With H = B Bᵀ, B upper triangular, an error E costs
tr(E H Eᵀ) = |E B|² = Σ_g |E_g B_gg + Σ_{f<g} E_f B_fg|², and term g depends on the groups up to g only. So each group
in turn takes the codeword c whose image c B_gg is nearest to W_g B_gg + Σ_{f<g} E_f B_fg.

Shape legend: O output rows, I input columns, J columns padded to whole groups and in the order of encoding, d columns
of a group, G = J / d groups.
"""

from __future__ import annotations

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
# The stored type of scales. The range of float32, so that no row underflows; codes are chosen for the rounded scale.
SCALE = torch.bfloat16


class Quantizer(Protocol):
    """A search for codewords."""

    def nearest(self, target_Od: Tensor, block_dd: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, int, any shape, and values (O, d) whose images, value @ block, are near to the target."""


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


@dataclass(frozen=True)
class LDLQProblem:
    """A weight ready for the search. unit_OJ: weight / scale, rotated if asked, 0 in rows with scale 0, float32.

    scale_O: float32, as stored; with a rotation it carries the signs of the outputs. weight_O: the cost of a unit
    error in a row, mean 1, float64.
    """

    unit_OJ: Tensor
    scale_O: Tensor
    weight_O: Tensor
    factor: HessianFactor
    rotated: bool

    def weight_OG(self) -> Tensor:
        """The cost of a unit error in a vector, float64."""
        return self.weight_O[:, None] * self.factor.blocks_Gdd().double().square().sum((1, 2))


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


def ldlq_problem(weight_OI: Tensor, factor: HessianFactor, signs: tuple[Tensor, Tensor] | None = None) -> LDLQProblem:
    """The weight with mean square 1, padded and in the order of encoding. ValueError if it holds NaN or Inf.

    Each row has a scale of its own. signs: of the inputs (I,) and outputs (O,) of a rotation; then all rows start with
    one scale, since a rotation of the outputs mixes them.
    """
    if not is_finite(weight_OI):
        raise ValueError("the weight holds NaN or Inf")
    square_O = weight_OI.double().square().mean(1)
    scale_O = (square_O if signs is None else square_O.mean().expand_as(square_O)).sqrt()
    scale_O = scale_O.to(SCALE).float()
    if signs is not None:
        scale_O = scale_O * signs[1].to(scale_O)
    unit_OI = weight_OI.float() / torch.where(scale_O != 0, scale_O, torch.inf)[:, None]
    if signs is not None:
        unit_OI = hadamard(hadamard(unit_OI * signs[0].to(unit_OI)), 0)
    padding = (0, len(factor.factor_JJ) - weight_OI.shape[1])
    unit_OJ = pad(unit_OI, padding).view(len(unit_OI), -1, factor.d)[:, factor.order_G].flatten(1)
    weight_O = scale_O.double().square()
    weight_O = weight_O / weight_O.mean().clamp(min=torch.finfo(torch.float64).tiny)
    return LDLQProblem(unit_OJ, scale_O, weight_O, factor, signs is not None)


def ldlq(problem: LDLQProblem, quantizer: Quantizer) -> tuple[list[Tensor], Tensor]:
    """The codes of every group in the order of encoding, and the values chosen for the unit weight, float32 (O, J)."""
    unit_OJ, factor_JJ, d = problem.unit_OJ, problem.factor.factor_JJ, problem.factor.d
    error_OJ, value_OJ = torch.zeros_like(unit_OJ), torch.empty_like(unit_OJ)
    codes = []
    for start in range(0, unit_OJ.shape[1], SPAN // d * d):
        end = min(start + SPAN // d * d, unit_OJ.shape[1])
        carry_OJ = error_OJ[:, :start] @ factor_JJ[:start, start:end]
        for at in range(start, end, d):
            group = slice(at, at + d)
            block_dd = factor_JJ[group, group]
            target_Od = unit_OJ[:, group] @ block_dd + carry_OJ[:, at - start : at - start + d]
            target_Od += error_OJ[:, start:at] @ factor_JJ[start:at, group]
            code, value_OJ[:, group] = quantizer.nearest(target_Od, block_dd)
            error_OJ[:, group] = unit_OJ[:, group] - value_OJ[:, group]
            codes.append(code)
    return codes, value_OJ


def fit_scales(problem: LDLQProblem, value_OJ: Tensor) -> Tensor:
    """Scales, float32 (O,), rounded as stored, with the least error for given codes: scale · (v H w) / (v H v)."""
    unit_OJ = problem.unit_OJ
    if problem.rotated:
        # The scales stand behind the rotation of the outputs, where rows that carry little get much of the noise.
        unit_OJ, value_OJ = hadamard(unit_OJ, 0), hadamard(value_OJ, 0)
    value_OJ, unit_OJ = value_OJ @ problem.factor.factor_JJ, unit_OJ @ problem.factor.factor_JJ
    energy_O = value_OJ.square().sum(1)
    gain_O = torch.where(energy_O > 0, (value_OJ * unit_OJ).sum(1) / energy_O, 1.0)
    scale_O = (problem.scale_O * gain_O.clamp(min=0)).to(SCALE).float()
    # With many bits per weight the rounding may cost more than the fit brings; then the row keeps what it has.
    gain_O = torch.where(problem.scale_O != 0, scale_O / problem.scale_O, 1.0)
    better_O = (unit_OJ - gain_O[:, None] * value_OJ).square().sum(1) < (unit_OJ - value_OJ).square().sum(1)
    return torch.where(better_O, scale_O, problem.scale_O)
