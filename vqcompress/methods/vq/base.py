"""What the two methods of vector quantization share: rotation, error feedback, scales, and products with packed codes.

A weight is diag(scale) · H · V · H · diag(signs), where the rows of V (O, I) are codewords for the unit Gaussian and H
is the orthonormal block Hadamard transform; without rotation it is diag(scale) · V. The rotation makes weights look
Gaussian, whatever they were (incoherence processing: QuIP#, arXiv 2402.04396, section 3).

Shape legend: T tokens, S rows sorted by expert, O output rows, I input columns, J columns padded to whole groups, G
groups of columns.
"""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vqcompress.errors import Fallback
from vqcompress.methods.base import Layout, Method, PackedTensors, Shape
from vqcompress.methods.feedback import HessianFactor, Quantizer, factorize_hessian, ldlq
from vqcompress.methods.hadamard import hadamard, random_signs
from vqcompress.methods.packing import pack, packed_width
from vqcompress.methods.rotation import pack_signs, signs_of_input, unpack_signs
from vqcompress.methods.statistics import Statistics
from vqcompress.methods.vq import reference
from vqcompress.methods.vq.format import Format
from vqcompress.methods.vq.scales import SCALE, fit_scales, ldlq_problem


class VectorQuantizer(Method):
    """Packed tensors of both methods: `codes` uint8, one bit stream per row or column of the weight (see `packing`);
    `scale` bfloat16 (O,); with a rotation `signs` uint8 (1, packed_width(I, 1)), where a set bit is −1. The signs of
    the outputs are those of `scale`.
    """

    name: ClassVar[str] = "vq"
    rotation: bool = Field(True, description="randomized Hadamard transform on both sides, undone at run time")
    feedback: bool = Field(True, description="let later columns correct the error of earlier ones; needs the Hessian")
    damping: float = Field(0.01, gt=0, le=1, description="share of the mean diagonal that is added to the Hessian")
    activation_order: bool = Field(True, description="encode the columns with the loudest inputs first")
    compensate: bool = Field(True, description="let the last layer of a block correct the errors of those before it")

    @property
    def form(self) -> Format:
        """How codes become values."""
        raise NotImplementedError

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian for error feedback, else its diagonal only."""
        return frozenset({"hessian" if self.feedback else "sumsq"})

    @property
    def tunable(self) -> tuple[str, ...]:
        """The scales."""
        return ("scale",)

    @property
    def compensates(self) -> bool:
        """Whether `compensate` is on and feedback gathers the Hessian that the correction needs."""
        return self.compensate and self.feedback

    def layout(self, shape: Shape) -> Layout:
        """codes, scale, and the signs of a rotation."""
        streams, count = self.form.stream(shape)
        layout: Layout = {
            "codes": (torch.uint8, (streams, packed_width(count, self.form.bits))),
            "scale": (SCALE, (shape[0],)),
        }
        if self.rotation:
            layout["signs"] = (torch.uint8, (1, packed_width(shape[1], 1)))
        return layout

    def encode(
        self, weight_OI: Tensor, statistics: Statistics, generator: torch.Generator, shared: PackedTensors | None = None
    ) -> PackedTensors:
        """The packed tensors of a weight. ValueError if it or the Hessian holds NaN or Inf."""
        quantizer, own = self._quantizer(weight_OI, statistics, generator, shared or {})
        signs = self._signs(weight_OI, statistics, generator)
        factor = self._factor(statistics, weight_OI, signs)
        problem = ldlq_problem(weight_OI, factor, signs)
        codes, value_OJ = ldlq(problem.unit_OJ, factor, quantizer)
        codes_G = torch.stack(codes)[factor.order_G.argsort()]
        streams = codes_G.movedim(0, 1).flatten(1) if self.form.by_rows else codes_G
        tensors = {"codes": pack(streams, self.form.bits), "scale": fit_scales(problem, value_OJ).to(SCALE)}
        if signs:
            tensors["signs"] = pack_signs(signs[0]).to(weight_OI.device)
        return tensors | own

    def _quantizer(
        self, weight_OI: Tensor, statistics: Statistics, generator: torch.Generator, shared: PackedTensors
    ) -> tuple[Quantizer, PackedTensors]:
        """The search for codes, and packed tensors that belong to it and to this weight alone."""
        raise NotImplementedError

    def _table(self, tensors: PackedTensors) -> Tensor:
        """The float32 entries that the operator reads; one zero where codewords are computed."""
        return torch.zeros(1, device=tensors["codes"].device)

    def _signs(
        self, weight_OI: Tensor, statistics: Statistics, generator: torch.Generator
    ) -> tuple[Tensor, Tensor] | None:
        """The signs of a rotation, (I,) by the input's seed and (O,) by the generator; None without one."""
        if not self.rotation:
            return None
        rows, columns = weight_OI.shape
        return signs_of_input(columns, statistics, generator), random_signs(rows, generator)

    def _factor(self, statistics: Statistics, weight_OI: Tensor, signs: tuple[Tensor, Tensor] | None) -> HessianFactor:
        options = self.form.d, self.feedback, self.damping, self.activation_order
        return factorize_hessian(statistics, weight_OI, *options, signs[0] if signs else None)

    def decode(self, tensors: PackedTensors, shape: Shape) -> Tensor:
        """The float32 (O, I) weight that was stored."""
        value_OI = reference.values(tensors["codes"], self._table(tensors), self.form, shape)
        scale_O1 = tensors["scale"].float()[:, None]
        if not self.rotation:
            return value_OI * scale_O1
        signs_I = unpack_signs(tensors["signs"], shape[1])[0]
        # The scale comes last, so that nothing overflows on the way.
        return hadamard(hadamard(value_OI.contiguous(), 0)) * signs_I * scale_O1

    def has_kernel(self, shape: Shape) -> bool:
        """Whether the kernels accept the shape."""
        return self.form.has_kernel(shape)

    def prepare(
        self, tensors: PackedTensors, shape: Shape, dtype: torch.dtype = torch.float32, packed: bool = False
    ) -> PackedTensors:
        """codes, scale, signs and a table of entries; the decoded weight on a CPU and where the kernels refuse."""
        on_cpu, has_kernel = tensors["codes"].device.type == "cpu", self.has_kernel(shape)
        if not has_kernel and not on_cpu:
            # Python shows the same message once.
            reason = f"a trellis of {shape[0]} outputs has no kernel, which needs a multiple of 32"
            warnings.warn(f"a weight is decoded once and multiplied dense: {reason}", Fallback, stacklevel=2)
        if not (packed if on_cpu else has_kernel):
            return super().prepare(tensors, shape, dtype)
        return {"table": self._table(tensors)} | {
            name: tensors[name] for name in ("codes", "scale", "signs") if name in tensors
        }

    def linear(self, x_TI: Tensor, prepared: PackedTensors, shape: Shape) -> Tensor:
        """x Wᵀ by a dense product, or by `reference.vq_linear`."""
        if "weight" in prepared:
            return super().linear(x_TI, prepared, shape)
        if x_TI.requires_grad and torch.is_grad_enabled():
            return reference.reference(x_TI, *stored(prepared), self.form)
        y_TO: Tensor = reference.vq_linear(x_TI, *stored(prepared), self.form.name)
        return y_TO

    def grouped(self, x_SI: Tensor, ends_E: Tensor, prepared: PackedTensors, shape: Shape) -> Tensor:
        """`linear` of the rows of every expert, by `reference.vq_linear`."""
        if "weight" in prepared or (x_SI.requires_grad and torch.is_grad_enabled()):
            return super().grouped(x_SI, ends_E, prepared, shape)
        y_SO: Tensor = reference.vq_linear(x_SI, *stored(prepared), self.form.name, ends_E)
        return y_SO


def stored(prepared: PackedTensors) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """codes, table, scale and signs, as `reference.vq_linear` takes them."""
    return prepared["codes"], prepared["table"], prepared["scale"], prepared.get("signs")
