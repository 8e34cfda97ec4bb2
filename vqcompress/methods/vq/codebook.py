"""Weights as sums of entries of learned codebooks, which `export --format aqlm` can hold (AQLM, arXiv 2401.06118).

`learned` has the search in codebooks and their training.
Shape legend: O output rows, I input columns, d vector length, G = ceil(I / d) groups of columns, R stages, K = 2**bits
entries of a stage.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vqcompress.methods.base import Layout, Method, PackedTensors, Shape
from vqcompress.methods.feedback import HessianFactor, Quantizer
from vqcompress.methods.packing import unpack
from vqcompress.methods.statistics import Statistics
from vqcompress.methods.vq.base import VectorQuantizer
from vqcompress.methods.vq.format import Format
from vqcompress.methods.vq.learned import CodebookSearch, learn, sample_rows
from vqcompress.methods.vq.scales import ldlq_problem

ENTRY = {8: torch.int8, 16: torch.int16}


class Codebook(VectorQuantizer):
    """`codes` (O, packed_width(G·R, bits)) holds one stream per row: group after group, in a group stage after stage.

    Also packed: `codebook` int8 or int16 (R, K, d), most used entry first, and `step` float32 (R,), shared by the
    block or the target's own. A group of V is Σ_r step_r · codebook[r, code_r]; what the last one has beyond I is cut.
    """

    codebook: Literal["learned"] = Field("learned", description="codewords are sums of learned entries")
    d: int = Field(4, ge=1, le=16, description="weights per code")
    bits: int = Field(8, ge=1, le=16, description="bits per code")
    rotation: bool = Field(False, description="randomized Hadamard transform on both sides, undone at run time")
    stages: int = Field(1, ge=1, le=4, description="residual stages; a codeword is the sum of one entry of each")
    scope: Literal["target", "block"] = Field("block", description="who has a codebook of its own")
    iterations: int = Field(12, ge=0, le=1000, description="k-means rounds on the weights")
    codebook_updates: int = Field(4, ge=0, le=100, description="rounds of moving entries to the weights they encode")
    training_vectors: int = Field(131072, ge=1, description="about how many vectors train a codebook")
    beam: int = Field(8, ge=1, le=256, description="candidates kept between residual stages; 1 is greedy")
    entry_bits: Literal[8, 16] = Field(8, description="bits of an entry's numbers; 16 from 5 bits a weight on")

    @property
    def form(self) -> Format:
        """One code per d weights and stage."""
        return Format("learned", self.d, self.bits, self.stages)

    @property
    def tunable(self) -> tuple[str, ...]:
        """Scales and entries."""
        return ("scale", "codebook")

    def _codebook_layout(self) -> Layout:
        size = self.stages, 1 << self.bits, self.d
        return {"codebook": (ENTRY[self.entry_bits], size), "step": (torch.float32, (self.stages,))}

    def layout(self, shape: Shape) -> Layout:
        """codes, scale and signs; codebook and step if they are the target's own."""
        return super().layout(shape) | (self._codebook_layout() if self.scope == "target" else {})

    def shared_layout(self) -> Layout:
        """codebook and step, if the block shares them."""
        return self._codebook_layout() if self.scope == "block" else {}

    def fit_shared(
        self, weights: list[Tensor], statistics: list[Statistics], generator: torch.Generator
    ) -> PackedTensors:
        """The codebook of a block, learned from rows of all its weights. ValueError if they hold NaN or Inf."""
        return self._learn(weights, statistics, generator) if self.scope == "block" else {}

    def _quantizer(
        self, weight_OI: Tensor, statistics: Statistics, generator: torch.Generator, shared: PackedTensors
    ) -> tuple[Quantizer, PackedTensors]:
        own = self._learn([weight_OI], [statistics], generator) if self.scope == "target" else {}
        return CodebookSearch(self._entries(own or shared), self.beam), own

    def _entries(self, tensors: PackedTensors) -> Tensor:
        """The entries in float32, (R, K, d)."""
        return tensors["codebook"].float() * tensors["step"][:, None, None]

    def _table(self, tensors: PackedTensors) -> Tensor:
        return self._entries(tensors).flatten()

    def _learn(self, weights: list[Tensor], statistics: list[Statistics], generator: torch.Generator) -> PackedTensors:
        """codebook and step for rows sampled from the weights."""
        vectors = sum(w.shape[0] * self.form.units((w.shape[0], w.shape[1])) for w in weights)
        # Targets with the same input share its statistics, and with them the factor of its Hessian.
        factors: dict[int, HessianFactor] = {}
        problems = []
        for weight_OI, known in zip(weights, statistics, strict=True):
            rows_OI = sample_rows(weight_OI, self.training_vectors / vectors, generator)
            signs = self._signs(rows_OI, known, generator)
            if id(known) not in factors:
                factors[id(known)] = self._factor(known, weight_OI, signs)
            problems.append(ldlq_problem(rows_OI, factors[id(known)], signs))
        size = self.stages, 1 << self.bits, self.d
        codebooks_RKd = learn(problems, size, self.beam, self.iterations, self.codebook_updates, generator)
        dtype = ENTRY[self.entry_bits]
        step_R = codebooks_RKd.abs().amax((1, 2)) / torch.iinfo(dtype).max
        step_R = torch.where(step_R > 0, step_R, 1.0)
        return {"codebook": (codebooks_RKd / step_R[:, None, None]).round().to(dtype), "step": step_R}


def entry_uses(method: Method, tensors: PackedTensors, shape: Shape) -> Tensor | None:
    """How often a weight uses each entry of its codebooks, int64 (R, K); None for a method without codebooks."""
    if not isinstance(method, Codebook):
        return None
    codes_NR = unpack(tensors["codes"], method.bits, method.form.stream(shape)[1]).view(-1, method.stages)
    return torch.stack([torch.bincount(code_N, minlength=1 << method.bits) for code_N in codes_NR.T])
