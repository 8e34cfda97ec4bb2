"""A weight made ready for codewords of the unit Gaussian, and the scales that are stored with its codes.

Shape legend: O output rows, I input columns, J columns padded to whole groups and in the order of encoding, d columns
of a group, G = J / d groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vqcompress.methods.base import is_finite
from vqcompress.methods.feedback import HessianFactor
from vqcompress.methods.hadamard import hadamard

# The stored type of scales. The range of float32, so that no row underflows; codes are chosen for the rounded scale.
SCALE = torch.bfloat16


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
