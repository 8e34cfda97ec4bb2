"""Vector quantization: runs of weights become codes of words, learned, universal, of a lattice or of a trellis.

A weight is a scale per row times a word for the unit Gaussian. The pieces, each replaceable by itself, lie in
`codebooks`: what an error costs and how later columns make good the error of earlier ones (`feedback`), and the four
families of words (`learned`, `universal`, `lattice`, `trellis`). With `rotation`, a randomized Hadamard transform on
both sides makes the weights look Gaussian first (incoherence processing: QuIP#, arXiv 2402.04396, section 3).

Shape legend: O output rows, I input columns, d vector length, G groups of d columns, R stages, K entries of a stage,
C codes of a row of the stored codes.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vqcompress.errors import Fallback
from vqcompress.methods.base import Layout, Method, PackedTensors, Shape
from vqcompress.methods.hadamard import hadamard, random_signs
from vqcompress.methods.statistics import Statistics
from vqcompress.methods.vq import lattice, trellis, universal
from vqcompress.methods.vq import reference as product
from vqcompress.methods.vq.format import Format
from vqcompress.methods.vq.ldlq import SCALE, Metric, Quantizer, error_feedback, fit_scales, measure, pose
from vqcompress.methods.vq.learned import Book, learn, sample_rows
from vqcompress.methods.vq.packing import check_padding, pack, packed_width, unpack

ENTRY = {8: torch.int8, 16: torch.int16}
LEARNING = ("stages", "scope", "iterations", "refits", "training_vectors", "beam", "entry_bits")
# What each family takes unless told otherwise; knobs that are not listed here or below do nothing for it.
FAMILIES: dict[str, dict[str, Any]] = {
    "learned": {"d": 4, "bits": 8, "rotation": False},
    "universal": {"d": 4, "bits": 8, "rotation": True},
    "lattice": {"d": 8, "bits": 16, "rotation": True},
    "trellis": {"d": 1, "bits": 2, "rotation": True},
}


class VQ(Method):
    """Codes of `bits` bits for every d weights and stage, a bfloat16 scale per row, and what the family needs.

    codebook: `learned` words are entries of a codebook that the block or the target learns; `universal` ones come from
    a table for the unit Gaussian that ships with the package; `lattice` ones from E8P, d 8 and bits 16, 24 or 32;
    `trellis` ones are computed from a walk through 2**states states, d 1 and bits 1 to 4.

    Packed tensors: codes, uint8, one bit stream per row (see `packing`). Of learned words (O, packed_width(C, bits)),
    group after group of a row of the weight and inside a group stage after stage; of the others (I, ·), one stream per
    *column* of the weight, from its first row to its last. scale, bfloat16 (O,). For learned words codebook, int8 or
    int16 (R, K, d), hottest entry first, and step, float32 (R,): shared by the block, or the target's own. With a
    rotation signs, uint8 (1, packed_width(I, 1)); the signs of the outputs are those of scale.
    The weight is diag(scale) · Hadamard · words · Hadamard · diag(signs), without the rotation scale · words; a word of
    learned ones is Σ_r step_r · codebook[r, code_r]. What the last group has beyond I is cut.
    """

    name: ClassVar[str] = "vq"
    codebook: Literal["learned", "universal", "lattice", "trellis"] = Field("learned", description="family of words")
    d: int = Field(4, ge=1, le=16, description="weights per code")
    bits: int = Field(8, ge=1, le=32, description="bits per code")
    rotation: bool = Field(False, description="randomized Hadamard transform on both sides, undone at run time")
    feedback: bool = Field(True, description="let later columns make good the error of earlier ones; needs the Hessian")
    damping: float = Field(0.01, gt=0, le=1, description="share of the mean diagonal that is added to the Hessian")
    activation_order: bool = Field(True, description="encode the columns with the loudest inputs first")
    compensate: bool = Field(True, description="let the last layer of a block make good the errors before it")
    states: int = Field(14, ge=8, le=16, description="trellis: bits of a state; each costs twice the time")
    stages: int = Field(1, ge=1, le=4, description="learned: residual stages; a word is the sum of an entry of each")
    scope: Literal["target", "block"] = Field("block", description="learned: who has a codebook of its own")
    iterations: int = Field(12, ge=0, le=1000, description="learned: k-means rounds on the weights")
    refits: int = Field(4, ge=0, le=100, description="learned: rounds of moving entries to what they encode")
    training_vectors: int = Field(131072, ge=1, description="learned: about how many vectors train a codebook")
    beam: int = Field(8, ge=1, le=256, description="learned: candidates kept between residual stages; 1 is greedy")
    entry_bits: Literal[8, 16] = Field(8, description="learned: bits of an entry's numbers; 16 from 5 bits a weight on")

    @model_validator(mode="before")
    @classmethod
    def _of_family(cls, knobs: Any) -> Any:
        """The knobs with the defaults of their family."""
        family = knobs.get("codebook", "learned") if isinstance(knobs, dict) else None
        return {**FAMILIES[family], **knobs} if isinstance(family, str) and family in FAMILIES else knobs

    @model_validator(mode="after")
    def _fit_together(self) -> VQ:
        """Refuse sizes that the family does not have, and knobs that would do nothing."""
        if self.codebook == "universal":
            universal.entries(self.d, self.bits)
        elif self.codebook == "lattice" and (self.d != lattice.DIMENSION or self.bits not in (16, 24, 32)):
            raise ValueError("a lattice has d 8 and bits 16, 24 or 32: 2, 3 or 4 bits per weight")
        elif self.codebook == "trellis" and (self.d != 1 or self.bits > 4):
            raise ValueError("a trellis has d 1 and 1 to 4 bits")
        elif self.codebook == "learned" and self.bits > 16:
            raise ValueError("learned codes have at most 16 bits")
        for knob in self._idle():
            if getattr(self, knob) != type(self).model_fields[knob].default:
                whose = "trellis codes" if knob == "states" else "learned codebooks"
                raise ValueError(f"{knob} is a knob of {whose}; {self.codebook} ones have none")
        return self

    def read_knobs(self) -> dict[str, Any]:
        """Without those of other families."""
        return self.model_dump(mode="json", exclude=set(self._idle()))

    def _idle(self) -> list[str]:
        """Knobs that do nothing for this family."""
        return [*(() if self._learned else LEARNING), *(() if self.codebook == "trellis" else ("states",))]

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian for the feedback, else only its diagonal."""
        return frozenset({"hessian" if self.feedback else "sumsq"})

    @property
    def tunable(self) -> tuple[str, ...]:
        """Scales, and what is learned of codebooks."""
        return ("scale", "codebook") if self._learned else ("scale",)

    @property
    def compensates(self) -> bool:
        """What the knob says; what is missing is found with the Hessian of the feedback."""
        return self.compensate and self.feedback

    @property
    def _learned(self) -> bool:
        return self.codebook == "learned"

    @property
    def form(self) -> Format:
        """How codes become values."""
        depth = {"learned": self.stages, "trellis": self.states}.get(self.codebook, 1)
        return Format(self.codebook, self.d, self.bits, depth)

    def layout(self, shape: Shape) -> Layout:
        """codes and scale; signs of a rotation; codebook and step too if they are the target's own."""
        rows, columns = shape
        streams, width = rows if self._learned else columns, -(-self._count(shape) * self.bits // 8)
        stored: Layout = {"codes": (torch.uint8, (streams, width)), "scale": (SCALE, (rows,))}
        if self.rotation:
            stored["signs"] = (torch.uint8, (1, packed_width(columns, 1)))
        return stored | self._codebook_layout() if self._learned and self.scope == "target" else stored

    def _count(self, shape: Shape) -> int:
        """Codes of a stream: of a row of learned words, of a column of others."""
        if self._learned:
            return self._groups(shape[1]) * self.stages
        return trellis.padded(shape[0]) if self.codebook == "trellis" else -(-shape[0] // self.d)

    def shared_layout(self) -> Layout:
        """codebook and step, if the block shares them."""
        return self._codebook_layout() if self._learned and self.scope == "block" else {}

    def fit_shared(
        self, weights: list[Tensor], statistics: list[Statistics], generator: torch.Generator
    ) -> PackedTensors:
        """The codebook of a block, learned from rows of all its weights. ValueError if they hold NaN or Inf."""
        return self._learn(weights, statistics, generator) if self.shared_layout() else {}

    def encode(
        self, weight_OI: Tensor, statistics: Statistics, generator: torch.Generator, shared: PackedTensors | None = None
    ) -> PackedTensors:
        """The parts of a weight. ValueError if it holds NaN or Inf, or if the codebook of the block is missing."""
        if self.shared_layout() and not shared:
            raise ValueError("vq with scope block encodes with the codebook that fit_shared returned; there is none")
        own = self._learn([weight_OI], [statistics], generator) if self._learned and self.scope == "target" else {}
        quantizer = self._quantizer(own or shared or {}, weight_OI.device)
        signs = self._signs(weight_OI, statistics, generator)
        metric = self._measure(statistics, weight_OI, quantizer.d, signs)
        problem = pose(weight_OI, metric, signs)
        codes, value_OJ = error_feedback(problem, quantizer)
        # From the order of encoding to that of the columns.
        codes_G = torch.stack(codes)[metric.order_G.argsort()]
        parts = {"codes": self._pack(codes_G), "scale": fit_scales(problem, value_OJ).to(SCALE)} | own
        return parts | {"signs": pack((signs[0][None] < 0).int(), 1).to(weight_OI.device)} if signs else parts

    def decode(self, parts: PackedTensors, shape: Shape) -> Tensor:
        """The float32 (O, I) weight that the parts stand for."""
        columns = shape[1]
        value_OI = product.values(parts["codes"], self._table(parts), self.form, shape)
        scale_O1 = parts["scale"].float()[:, None]
        if not self.rotation:
            return value_OI * scale_O1
        signs_I = 1.0 - 2.0 * unpack(parts["signs"], 1, columns)[0]
        # Last of all the scale, so that nothing overflows on the way.
        weight_OI = hadamard(hadamard(value_OI.contiguous(), 0)) * signs_I * scale_O1
        limit = torch.finfo(torch.float32).max
        return weight_OI.clamp(-limit, limit)

    def prepare(
        self, parts: PackedTensors, shape: Shape, dtype: torch.dtype = torch.float32, packed: bool = False
    ) -> PackedTensors:
        """The decoded weight on a CPU and where the kernels refuse; else codes, scale, signs, and a table of words."""
        on_cpu, refusal = parts["codes"].device.type == "cpu", self.form.refusal(shape)
        if refusal and not on_cpu:
            # Python shows one message once.
            warnings.warn(f"a weight is decoded once and multiplied dense: {refusal}", Fallback, stacklevel=2)
        if (on_cpu and not packed) or (not on_cpu and refusal):
            return super().prepare(parts, shape, dtype)
        read = {name: parts[name] for name in ("codes", "scale", "signs") if name in parts}
        return read | {"table": self._table(parts)}

    def linear(self, x_TI: Tensor, prepared: PackedTensors, shape: Shape) -> Tensor:
        """x Wᵀ by a dense product, or of `product.vq_linear`."""
        if "weight" in prepared:
            return super().linear(x_TI, prepared, shape)
        form, stored = self.form, (prepared["codes"], prepared["table"], prepared["scale"], prepared.get("signs"))
        if x_TI.requires_grad and torch.is_grad_enabled():
            return product.reference(x_TI, *stored, form)
        y_TO: Tensor = product.vq_linear(x_TI, *stored, form.family, form.d, form.bits, form.depth)
        return y_TO

    def grouped(self, x_SI: Tensor, ends_E: Tensor, prepared: PackedTensors, shape: Shape) -> Tensor:
        """`linear` of the rows of every expert, of `product.vq_grouped`."""
        if "weight" in prepared or (x_SI.requires_grad and torch.is_grad_enabled()):
            return super().grouped(x_SI, ends_E, prepared, shape)
        form, stored = self.form, (prepared["codes"], prepared["table"], prepared["scale"], prepared.get("signs"))
        y_SO: Tensor = product.vq_grouped(x_SI, ends_E, *stored, form.family, form.d, form.bits, form.depth)
        return y_SO

    def has_kernel(self, shape: Shape) -> bool:
        """Unless its streams end within a word."""
        return not self.form.refusal(shape)

    def path(self, shape: Shape, rows: int, device: torch.device, packed: bool = False, grouped: bool = False) -> str:
        """The kernel, or why there is none."""
        if device.type == "cpu" or self.form.refusal(shape):
            reason = self.form.refusal(shape) if device.type != "cpu" else ""
            return super().path(shape, rows, device, packed) + (f" ({reason})" if reason else "")
        return "multiply" if grouped else product.path(self.form, device, rows, shape)

    def check(self, parts: PackedTensors, shape: Shape) -> None:
        """Raise ValueError naming the part if it is missing, of another type or shape, not finite or has stray bits."""
        for name, (dtype, size) in (self.layout(shape) | self.shared_layout()).items():
            if name not in parts:
                raise ValueError(f"{name} is missing")
            if parts[name].dtype != dtype or parts[name].shape != size:
                found = f"{parts[name].dtype} {tuple(parts[name].shape)}"
                raise ValueError(f"{name} is {found}; it must be {dtype} {size}")
        super().check(parts, shape)
        check_padding(parts["codes"], self.bits, self._count(shape))
        if self.rotation:
            check_padding(parts["signs"], 1, shape[1])

    def counts(self, parts: PackedTensors, shape: Shape) -> Tensor | None:
        """Uses of the entries, learned or universal; of the 256 patterns of first words; nothing of a trellis."""
        if self.codebook == "trellis":
            return None
        if self.codebook == "lattice":
            return torch.bincount(parts["codes"].reshape(-1, self.bits // 8)[:, 0], minlength=256)[None]
        stages = self.stages if self._learned else 1
        codes_NR = unpack(parts["codes"], self.bits, self._count(shape)).reshape(-1, stages)
        return torch.stack([torch.bincount(code_N, minlength=1 << self.bits) for code_N in codes_NR.T])

    @property
    def compiled_bytes(self) -> int:
        """numba and its compiler, for the searches that are compiled."""
        return 150 << 20 if self.codebook in ("trellis", "lattice") else 0

    def encode_bytes(self, shape: Shape) -> int:
        """Twelve float32 copies of the weight at most; two float64 and two float32 ones of the Hessian."""
        return 48 * shape[0] * shape[1] + 24 * shape[1] ** 2

    def encode_flops(self, shape: Shape) -> float:
        """The search and the feedback, and once per round of the share that trains a codebook of the target's own."""
        own = self._rounds(shape) if self._learned and self.scope == "target" else 0.0
        return (1 + own) * self._search_flops(shape) + 4 * shape[1] ** 3

    def fit_flops(self, shape: Shape) -> float:
        """The same of the rounds that train the codebook of a block."""
        return self._rounds(shape) * self._search_flops(shape) if self._learned and self.scope == "block" else 0.0

    def _search_flops(self, shape: Shape) -> float:
        family = {"universal": 2 << self.bits, "lattice": 2048, "trellis": 8 << min(self.states, 30)}
        learned = 2 * (1 << self.bits) * (1 + (self.stages - 1) * self.beam)
        return shape[0] * shape[1] * float((learned if self._learned else family[self.codebook]) + 2 * shape[1])

    def _rounds(self, shape: Shape) -> float:
        # A block has about seven targets of this size, which share what is learned unless each has its own codebook.
        learners = 7 if self.scope == "block" else 1
        share = min(1.0, self.training_vectors * self.d / (learners * shape[0] * shape[1]))
        return (self.iterations + self.refits + 1) * share

    def _groups(self, columns: int) -> int:
        return -(-columns // self.d)

    def _codebook_layout(self) -> Layout:
        size = (self.stages, 1 << self.bits, self.d)
        return {"codebook": (ENTRY[self.entry_bits], size), "step": (torch.float32, (self.stages,))}

    def _entries(self, parts: PackedTensors) -> Tensor:
        """The learned codebooks in float32, (R, K, d)."""
        return parts["codebook"].float() * parts["step"][:, None, None]

    def _table(self, parts: PackedTensors) -> Tensor:
        """What the operator looks words up in."""
        return self._entries(parts).flatten() if self._learned else product.table(self.form, parts["codes"].device)

    def _quantizer(self, parts: PackedTensors, device: torch.device) -> Quantizer:
        if self.codebook == "lattice":
            return lattice.Lattice(self.bits // 8)
        if self.codebook == "trellis":
            return trellis.Trellis(self.bits, self.states)
        if self.codebook == "universal":
            return universal.Universal(universal.entries(self.d, self.bits).to(device))
        return Book(self._entries(parts), self.beam)

    def _pack(self, codes_G: Tensor) -> Tensor:
        """Codes of groups (G, …) in the order of the columns as they are stored."""
        if self.codebook == "lattice":
            return codes_G.flatten(1)
        if not self._learned:
            return pack(codes_G, self.bits)
        return pack(codes_G.movedim(0, 1).flatten(1), self.bits)

    def _signs(
        self, weight_OI: Tensor, statistics: Statistics, generator: torch.Generator
    ) -> tuple[Tensor, Tensor] | None:
        """The signs of a rotation, (I,) by the input and (O,) by the generator; None without one."""
        if not self.rotation:
            return None
        of_input = generator if statistics.seed is None else torch.Generator().manual_seed(statistics.seed)
        rows, columns = weight_OI.shape
        return random_signs(columns, of_input), random_signs(rows, generator)

    def _measure(
        self, statistics: Statistics, weight_OI: Tensor, d: int, signs: tuple[Tensor, Tensor] | None
    ) -> Metric:
        of_input = signs[0] if signs else None
        return measure(statistics, weight_OI, d, self.feedback, self.damping, self.activation_order, of_input)

    def _learn(self, weights: list[Tensor], statistics: list[Statistics], generator: torch.Generator) -> PackedTensors:
        """codebook and step for rows sampled from the weights."""
        share = self.training_vectors / sum(w.shape[0] * self._groups(w.shape[1]) for w in weights)
        # Targets with the same input share its statistics, so its factorization too.
        metrics: dict[int, Metric] = {}
        problems = []
        for weight_OI, facts in zip(weights, statistics, strict=True):
            rows_OI = sample_rows(weight_OI, share, generator)
            signs = self._signs(rows_OI, facts, generator)
            if id(facts) not in metrics or facts.seed is None:
                metrics[id(facts)] = self._measure(facts, weight_OI, self.d, signs)
            problems.append(pose(rows_OI, metrics[id(facts)], signs))
        size = (self.stages, 1 << self.bits, self.d)
        codebooks_RKd = learn(problems, size, self.beam, self.iterations, self.refits, generator)
        step_R = codebooks_RKd.abs().amax((1, 2)) / torch.iinfo(ENTRY[self.entry_bits]).max
        step_R = torch.where(step_R > 0, step_R, 1.0)
        integers_RKd = (codebooks_RKd / step_R[:, None, None]).round()
        return {"codebook": integers_RKd.to(ENTRY[self.entry_bits]), "step": step_R}
