"""Vector quantization, VQ<d, bits, stages>: runs of d weights of a row become codes into learned codebooks.

A weight is a scale per row times a sum of one codebook entry per stage. The pieces, each replaceable by itself:

- what an error costs: `Metric`, made from the statistics by `measure`
- scales of rows: `pose` before the search, `fit_scales` after it
- where entries come from: `lloyd` (k-means on the weights), then `refit` (on what the search really asks for)
- the search of one vector: `nearest`
- how later columns make good the error of earlier ones: `error_feedback`

The error feedback is block LDLQ (QuIP#, arXiv 2402.04396, section 4.1; its d = 1 is GPTQ, arXiv 2210.17323; GPTVQ,
arXiv 2402.15319, section 3, uses it with learned codebooks), written without an inverse. With H = B Bᵀ, B upper
triangular, an error E costs tr(E H Eᵀ) = |E B|² = Σ_g |E_g B_gg + Σ_{f<g} E_f B_fg|², and term g depends on the groups
up to g only. So each group in turn takes the codeword c whose image c B_gg is nearest to W_g B_gg + Σ_{f<g} E_f B_fg.

Shape legend: O output rows, I input columns, J columns padded to whole groups and in the order of encoding, d vector
length, G = J / d groups, R stages, K entries of a stage, N vectors, M candidates of a beam, C = G·R codes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from vqcompress.methods.method import Layout, Method, Parts, Shape
from vqcompress.packing import check_padding, pack, packed_width, unpack
from vqcompress.statistics import Statistics

# Columns whose feedback is added in one product; inside a span it goes group by group.
SPAN = 128
# Numbers in the largest temporary of a search.
CHUNK = 1 << 22
# The range of float32, so that no row underflows; codes and gain are chosen for the rounded scale.
SCALE = torch.bfloat16
ENTRY = {8: torch.int8, 16: torch.int16}


class VQ(Method):
    """Codes of `bits` bits for every d weights and stage, a bfloat16 scale per row, and codebooks of small integers.

    Parts: codes, uint8 (O, packed_width(C, bits)): one bit stream per row (see `packing`), group after group and inside
    a group stage after stage. scale, bfloat16 (O,). codebook, int8 or int16 (R, K, d), hottest entry first, and step,
    float32 (R,): shared by the block, or the target's own. A weight is scale · Σ_r step_r · codebook[r, code_r]; what
    the last group has beyond I is cut. int8 costs no quality up to 4 bits per weight (GPTVQ, section 3.3, stores it).
    """

    name: ClassVar[str] = "vq"
    d: int = Field(4, ge=1, le=16, description="weights per vector")
    bits: int = Field(8, ge=1, le=16, description="bits per code; a codebook has 2**bits entries (slow above 12)")
    stages: int = Field(1, ge=1, le=4, description="residual stages; a vector is the sum of one entry of each")
    scope: Literal["target", "block"] = Field("block", description="whether a target or its whole block has a codebook")
    feedback: bool = Field(True, description="let later columns make good the error of earlier ones; needs the Hessian")
    damping: float = Field(0.01, gt=0, le=1, description="share of the mean diagonal that is added to the Hessian")
    iterations: int = Field(12, ge=0, le=1000, description="k-means rounds on the weights")
    refits: int = Field(4, ge=0, le=100, description="rounds of encoding and moving entries to what they encode")
    training_vectors: int = Field(131072, ge=1, description="about how many vectors train a codebook; whole rows")
    beam: int = Field(8, ge=1, le=256, description="candidates kept between residual stages; 1 is greedy")
    entry_bits: Literal[8, 16] = Field(8, description="bits of a number in a codebook; 16 from 5 bits per weight on")

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian for the feedback, else only its diagonal."""
        return frozenset({"hessian" if self.feedback else "sumsq"})

    def layout(self, shape: Shape) -> Layout:
        """codes and scale; codebook and step too if they are the target's own."""
        width = packed_width(self._groups(shape[1]) * self.stages, self.bits)
        stored: Layout = {"codes": (torch.uint8, (shape[0], width)), "scale": (SCALE, (shape[0],))}
        return stored | self._codebook_layout() if self.scope == "target" else stored

    def shared_layout(self) -> Layout:
        """codebook and step, if the block shares them."""
        return self._codebook_layout() if self.scope == "block" else {}

    def fit_shared(self, weights: list[Tensor], statistics: list[Statistics], generator: torch.Generator) -> Parts:
        """The codebook of a block, learned from rows of all its weights. ValueError if they hold NaN or Inf."""
        return {} if self.scope == "target" else self._learn(weights, statistics, generator)

    def encode(
        self, weight_OI: Tensor, statistics: Statistics, generator: torch.Generator, shared: Parts | None = None
    ) -> Parts:
        """The parts of a weight. ValueError if it holds NaN or Inf, or if the codebook of the block is missing."""
        if self.scope == "block" and not shared:
            raise ValueError("vq with scope block encodes with the codebook that fit_shared returned; there is none")
        own = self._learn([weight_OI], [statistics], generator) if self.scope == "target" else {}
        codebooks_RKd = entries(own or shared or {})
        problem = pose(weight_OI, measure(statistics, weight_OI, self))
        codes_OGR, _ = error_feedback(problem, codebooks_RKd, self.beam)
        scale_O = fit_scales(problem, sum_entries(codes_OGR, codebooks_RKd))
        codes_OC = codes_OGR[:, problem.metric.order_G.argsort()].flatten(1)
        return {"codes": pack(codes_OC, self.bits), "scale": scale_O.to(SCALE)} | own

    def decode(self, parts: Parts, shape: Shape) -> Tensor:
        """scale · Σ_r step_r · codebook[r, code_r], float32 (O, I)."""
        groups = self._groups(shape[1])
        codes_OC = unpack(parts["codes"], self.bits, groups * self.stages)
        values_OJ = sum_entries(codes_OC.view(shape[0], groups, self.stages), entries(parts))
        return values_OJ[:, : shape[1]] * parts["scale"].float()[:, None]

    def check(self, parts: Parts, shape: Shape) -> None:
        """Raise ValueError naming the part if it is missing, of another type or shape, not finite or has stray bits."""
        for name, (dtype, size) in (self.layout(shape) | self.shared_layout()).items():
            if name not in parts:
                raise ValueError(f"{name} is missing")
            if parts[name].dtype != dtype or parts[name].shape != size:
                found = f"{parts[name].dtype} {tuple(parts[name].shape)}"
                raise ValueError(f"{name} is {found}; it must be {dtype} {size}")
        super().check(parts, shape)
        check_padding(parts["codes"], self.bits, self._groups(shape[1]) * self.stages)

    def encode_flops(self, shape: Shape) -> float:
        """The search and the feedback, once for the codes and once per round of the share that trains the codebook."""
        weights, columns = shape[0] * shape[1], shape[1]
        search = 2 * weights * (1 << self.bits) * (1 + (self.stages - 1) * self.beam)
        # A block has about seven targets of this size, which share what is learned unless each has its own codebook.
        learners = 7 if self.scope == "block" else 1
        rounds = (self.iterations + self.refits + 1) * min(1.0, self.training_vectors * self.d / (learners * weights))
        return (1 + rounds) * (search + 2 * weights * columns) + 4 * columns**3

    def _groups(self, columns: int) -> int:
        return -(-columns // self.d)

    def _codebook_layout(self) -> Layout:
        size = (self.stages, 1 << self.bits, self.d)
        return {"codebook": (ENTRY[self.entry_bits], size), "step": (torch.float32, (self.stages,))}

    def _learn(self, weights: list[Tensor], statistics: list[Statistics], generator: torch.Generator) -> Parts:
        """codebook and step for rows sampled from the weights."""
        share = self.training_vectors / sum(w.shape[0] * self._groups(w.shape[1]) for w in weights)
        # Targets with the same input share its statistics, so its factorization too.
        metrics: dict[int, Metric] = {}
        for weight_OI, input_statistics in zip(weights, statistics, strict=True):
            if id(input_statistics) not in metrics:
                metrics[id(input_statistics)] = measure(input_statistics, weight_OI, self)
        rows = [sample_rows(w, share, generator) for w in weights]
        problems = [pose(rows_OI, metrics[id(s)]) for rows_OI, s in zip(rows, statistics, strict=True)]
        vectors_Nd = torch.cat([p.unit_OJ.reshape(-1, self.d) for p in problems])
        weight_N = torch.cat([p.weight_OG().flatten() for p in problems])
        codebooks_RKd = lloyd(vectors_Nd, weight_N, self, generator)
        for _ in range(self.refits):
            codebooks_RKd = refit(problems, codebooks_RKd, self.beam)
        codebooks_RKd = hottest_first(problems, codebooks_RKd, self.beam)
        step_R = codebooks_RKd.abs().amax((1, 2)) / torch.iinfo(ENTRY[self.entry_bits]).max
        step_R = torch.where(step_R > 0, step_R, 1.0)
        integers_RKd = (codebooks_RKd / step_R[:, None, None]).round()
        return {"codebook": integers_RKd.to(ENTRY[self.entry_bits]), "step": step_R}


@dataclass(frozen=True)
class Metric:
    """What an error E of a weight with this input costs: |E B|², and the order in which its groups are encoded.

    factor_JJ: upper triangular B with B Bᵀ = damped H / mean(diag H), float32; zero rows for padding. order_G: which
    group of the weight is encoded g-th. d: columns of a group. feeds: B has more than its diagonal.
    """

    factor_JJ: Tensor
    order_G: Tensor
    d: int
    feeds: bool

    def blocks_Gdd(self) -> Tensor:
        """The diagonal blocks B_gg."""
        groups = len(self.order_G)
        return self.factor_JJ.view(groups, self.d, groups, self.d).diagonal(dim1=0, dim2=2).movedim(2, 0)


@dataclass(frozen=True)
class Problem:
    """A weight ready for the search. unit_OJ: weight / scale, 0 in rows with scale 0. scale_O: float32, as stored.

    weight_O: what a unit error of a row costs, mean 1, float64.
    """

    unit_OJ: Tensor
    scale_O: Tensor
    weight_O: Tensor
    metric: Metric

    def weight_OG(self) -> Tensor:
        """What a unit error of a vector costs."""
        return self.weight_O[:, None] * self.metric.blocks_Gdd().double().square().sum((1, 2))


def measure(statistics: Statistics, weight_OI: Tensor, knobs: VQ) -> Metric:
    """The metric of an input: its Hessian if there is one and feedback is wanted, else its diagonal, else all equal."""
    columns, d, device = weight_OI.shape[1], knobs.d, weight_OI.device
    hessian_II = statistics.hessian_II if knobs.feedback else None
    feeds = hessian_II is not None
    if hessian_II is None:
        diagonal_I = statistics.sumsq_I
        if diagonal_I is None and statistics.hessian_II is not None:
            diagonal_I = statistics.hessian_II.diagonal()
        hessian_II = torch.ones(columns).diag() if diagonal_I is None else diagonal_I.diag()
    if not torch.isfinite(hessian_II).all():
        raise ValueError("the statistics of the input hold NaN or Inf")
    hessian_JJ = pad(hessian_II.to(device, torch.float64), (0, -columns % d) * 2)
    # Errors go from early to late groups, so the heavy ones come first (the "act-order" of GPTQ's code). The order is
    # only that of encoding: it is not stored.
    order_G = hessian_JJ.diagonal().reshape(-1, d).sum(1).argsort(descending=True, stable=True)
    index_J = (order_G[:, None] * d + torch.arange(d, device=device)).flatten()
    factor_JJ = factorize(hessian_JJ[index_J][:, index_J], knobs.damping)
    factor_JJ[index_J >= columns] = 0
    return Metric(factor_JJ, order_G, d, feeds)


def factorize(hessian_JJ: Tensor, damping: float) -> Tensor:
    """Upper triangular B, float32, with B Bᵀ = H / mean(diag H) + damping · 1; more damping if H is not definite then.

    A Hessian of zeros counts as the identity. Channels that were never active weigh `damping`.
    """
    mean = hessian_JJ.diagonal().mean()
    eye_JJ = torch.ones_like(hessian_JJ[0]).diag()
    unit_JJ = hessian_JJ / mean if mean > 0 else eye_JJ
    while True:
        # Cholesky of the matrix read backwards: eliminating the last column first makes the factor upper triangular.
        lower_JJ, info = torch.linalg.cholesky_ex((unit_JJ + damping * eye_JJ).flip(0, 1))
        if info == 0:
            # The rounding also hides the last bits of float64, which depend on the number of threads.
            return lower_JJ.flip(0, 1).float().contiguous()
        damping *= 10


def pose(weight_OI: Tensor, metric: Metric) -> Problem:
    """The weight in rows of mean square 1, padded and in the order of encoding. ValueError if it holds NaN or Inf."""
    if not torch.isfinite(weight_OI).all():
        raise ValueError("the weight holds NaN or Inf")
    scale_O = weight_OI.double().square().mean(1).sqrt().clamp(max=torch.finfo(SCALE).max).to(SCALE).float()
    padding = (0, len(metric.factor_JJ) - weight_OI.shape[1])
    weight_OGd = pad(weight_OI.float(), padding).view(len(weight_OI), -1, metric.d)[:, metric.order_G]
    unit_OJ = weight_OGd.flatten(1) / torch.where(scale_O > 0, scale_O, torch.inf)[:, None]
    weight_O = scale_O.double().square()
    return Problem(unit_OJ, scale_O, weight_O / weight_O.mean().clamp(min=torch.finfo(torch.float64).tiny), metric)


def nearest(target_Nd: Tensor, codebooks_RKd: Tensor, beam: int) -> Tensor:
    """Codes (N, R), int64, of the entries whose sum is nearest to each target; a beam search from stage to stage."""
    stages, count, d = codebooks_RKd.shape
    rows = max(1, CHUNK // (count * (beam if stages > 1 else 1)))
    if len(target_Nd) > rows:
        return torch.cat([nearest(chunk_Nd, codebooks_RKd, beam) for chunk_Nd in target_Nd.split(rows)])
    rest_NMd = target_Nd[:, None]
    codes_NMR = torch.empty((len(target_Nd), 1, 0), dtype=torch.int64, device=target_Nd.device)
    for stage, book_Kd in enumerate(codebooks_RKd):
        # Half the squared distance, less |rest|² / 2 where there is one candidate, so that it does not matter.
        half_K = book_Kd.square().sum(1) / 2
        score_NMK = torch.addmm(half_K, rest_NMd.reshape(-1, d), book_Kd.T, alpha=-1).view(len(rest_NMd), -1, count)
        if rest_NMd.shape[1] > 1:
            score_NMK += rest_NMd.square().sum(2, keepdim=True) / 2
        flat = score_NMK.flatten(1)
        keep = 1 if stage == stages - 1 else min(beam, flat.shape[1])
        best_NM = flat.argmin(1, keepdim=True) if keep == 1 else flat.topk(keep, 1, largest=False).indices
        origin_NM, code_NM = best_NM // count, best_NM % count
        before_NMR = codes_NMR.gather(1, origin_NM[..., None].expand(-1, -1, stage))
        codes_NMR = torch.cat([before_NMR, code_NM[..., None]], 2)
        rest_NMd = rest_NMd.gather(1, origin_NM[..., None].expand(-1, -1, d)) - book_Kd[code_NM]
    return codes_NMR[:, 0]


def error_feedback(problem: Problem, codebooks_RKd: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """Codes (O, G, R) in the order of encoding, and the error of the unit weight that they leave, float32 (O, J)."""
    unit_OJ, factor_JJ, d = problem.unit_OJ, problem.metric.factor_JJ, problem.metric.d
    error_OJ = torch.zeros_like(unit_OJ)
    codes = []
    for start in range(0, unit_OJ.shape[1], SPAN // d * d):
        end = min(start + SPAN // d * d, unit_OJ.shape[1])
        carry_OJ = error_OJ[:, :start] @ factor_JJ[:start, start:end] if problem.metric.feeds else None
        for at in range(start, end, d):
            group = slice(at, at + d)
            block_dd = factor_JJ[group, group]
            target_Od = unit_OJ[:, group] @ block_dd
            if carry_OJ is not None:
                target_Od += carry_OJ[:, at - start : at - start + d]
                target_Od += error_OJ[:, start:at] @ factor_JJ[start:at, group]
            code_OR = nearest(target_Od, codebooks_RKd @ block_dd, beam)
            error_OJ[:, group] = unit_OJ[:, group] - sum_entries(code_OR[:, None], codebooks_RKd)
            codes.append(code_OR)
    return torch.stack(codes, 1), error_OJ


def sum_entries(codes_OGR: Tensor, codebooks_RKd: Tensor) -> Tensor:
    """Σ_r codebook[r, code_r], float32 (O, J), added in the order of the stages."""
    values_OGd = codebooks_RKd[0][codes_OGR[..., 0]]
    for stage in range(1, codes_OGR.shape[2]):
        values_OGd = values_OGd + codebooks_RKd[stage][codes_OGR[..., stage]]
    return values_OGd.flatten(1)


def entries(parts: Parts) -> Tensor:
    """The codebooks in float32, (R, K, d): step · integer."""
    return parts["codebook"].float() * parts["step"][:, None, None]


def fit_scales(problem: Problem, values_OJ: Tensor) -> Tensor:
    """Scales, float32 (O,), rounded as stored, with the least error for given codes: scale · (v H w) / (v H v)."""
    value_OJ = values_OJ @ problem.metric.factor_JJ
    unit_OJ = problem.unit_OJ @ problem.metric.factor_JJ
    energy_O = value_OJ.square().sum(1)
    gain_O = torch.where(energy_O > 0, (value_OJ * unit_OJ).sum(1) / energy_O, 1.0)
    scale_O = (problem.scale_O * gain_O).clamp(0, torch.finfo(SCALE).max).to(SCALE).float()
    # With many bits per weight the rounding may cost more than the fit brings; then the row keeps what it has.
    gain_O = torch.where(problem.scale_O > 0, scale_O / problem.scale_O, 1.0)
    better_O = (unit_OJ - gain_O[:, None] * value_OJ).square().sum(1) < (unit_OJ - value_OJ).square().sum(1)
    return torch.where(better_O, scale_O, problem.scale_O)


def sample_rows(weight_OI: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of the rows, at least one, in their order."""
    rows = len(weight_OI)
    index = torch.randperm(rows, generator=generator, device=generator.device)[: max(1, round(rows * min(share, 1)))]
    return weight_OI[index.sort().values.to(weight_OI.device)]


def lloyd(vectors_Nd: Tensor, weight_N: Tensor, knobs: VQ, generator: torch.Generator) -> Tensor:
    """Codebooks (R, K, d) by weighted k-means: stage after stage on what is left over, then all stages together."""
    weight_N = weight_N / weight_N.mean().clamp(min=torch.finfo(torch.float64).tiny) + 1e-9
    codebooks_RKd = vectors_Nd.new_zeros((knobs.stages, 1 << knobs.bits, knobs.d))
    rest_Nd = vectors_Nd
    for stage, book_Kd in enumerate(codebooks_RKd):
        book_Kd[:] = seed_entries(rest_Nd, weight_N, len(book_Kd), generator)
        for _ in range(knobs.iterations):
            code_N = nearest(rest_Nd, book_Kd[None], 1)[:, 0]
            book_Kd[:] = means(rest_Nd, weight_N, code_N, book_Kd)
        if stage < knobs.stages - 1:
            rest_Nd = rest_Nd - book_Kd[nearest(rest_Nd, book_Kd[None], 1)[:, 0]]
    for _ in range(knobs.iterations if knobs.stages > 1 else 0):
        codes_NR = nearest(vectors_Nd, codebooks_RKd, knobs.beam)
        for stage, book_Kd in enumerate(codebooks_RKd):
            rest_Nd = vectors_Nd - sum_entries(codes_NR[:, None], codebooks_RKd) + book_Kd[codes_NR[:, stage]]
            book_Kd[:] = means(rest_Nd, weight_N, codes_NR[:, stage], book_Kd)
    return codebooks_RKd


def seed_entries(vectors_Nd: Tensor, weight_N: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Entries (K, d) drawn by k-means++ (Arthur and Vassilvitskii 2007): by weight times distance to those drawn."""
    # More than 32 vectors per entry do not make better seeds, and each draw costs a pass over all.
    index = torch.randperm(len(vectors_Nd), generator=generator, device=generator.device).to(vectors_Nd.device)
    vectors_Nd, weight_N = vectors_Nd[index[: 32 * count]], weight_N[index[: 32 * count]]
    draws_K = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64).to(weight_N.device)
    book_Kd = vectors_Nd.new_empty((count, vectors_Nd.shape[1]))
    distance_N = torch.full_like(weight_N, torch.inf)
    mass_N = weight_N
    for k in range(count):
        sum_N = mass_N.cumsum(0)
        at = torch.searchsorted(sum_N, sum_N[-1] * draws_K[k], right=True).clamp(max=len(vectors_Nd) - 1)
        book_Kd[k] = vectors_Nd[at]
        distance_N = torch.minimum(distance_N, (vectors_Nd - book_Kd[k]).square().sum(1))
        mass_N = distance_N * weight_N
    return book_Kd


def means(vectors_Nd: Tensor, weight_N: Tensor, code_N: Tensor, book_Kd: Tensor) -> Tensor:
    """The weighted mean of each entry's vectors (K, d). Entries without any move to the vectors that cost most."""
    # Sums in float64, so that their order does not show in the result.
    mass_K = weight_N.new_zeros(len(book_Kd)).index_add_(0, code_N, weight_N)
    sum_Kd = weight_N.new_zeros(book_Kd.shape).index_add_(0, code_N, weight_N[:, None] * vectors_Nd)
    empty_K = mass_K == 0
    new_Kd = torch.where(empty_K[:, None], book_Kd, (sum_Kd / mass_K[:, None]).float())
    if empty_K.any():
        cost_N = (vectors_Nd - new_Kd[code_N]).square().sum(1) * weight_N
        worst_N = cost_N.topk(min(int(empty_K.sum()), len(cost_N))).indices
        new_Kd[empty_K.nonzero()[: len(worst_N), 0]] = vectors_Nd[worst_N]
    return new_Kd


def refit(problems: list[Problem], codebooks_RKd: Tensor, beam: int) -> Tensor:
    """Codebooks moved to the least squares of what they encode with error feedback, under each group's own metric.

    With the loss L = E B, group g of row o loses |L_og − δ B_gg|² · weight_o if its entry moves by δ. So δ solves
    (Σ weight_o B_gg B_ggᵀ) δ = Σ weight_o B_gg L_og over the vectors of the entry, stage by stage (the codebook update
    of GPTVQ, section 3.2, in closed form and inside the feedback).
    """
    codebooks_RKd, (_, count, d) = codebooks_RKd.clone(), codebooks_RKd.shape
    codes, losses = [], []
    for p in problems:
        codes_OGR, error_OJ = error_feedback(p, codebooks_RKd, beam)
        codes.append(codes_OGR)
        losses.append((error_OJ @ p.metric.factor_JJ).view(len(error_OJ), -1, d).double())
    for stage, book_Kd in enumerate(codebooks_RKd):
        curve_Kdd = losses[0].new_zeros((count, d, d))
        slope_Kd = losses[0].new_zeros((count, d))
        for p, codes_OGR, loss_OGd in zip(problems, codes, losses, strict=True):
            block_Gdd = p.metric.blocks_Gdd().double()
            code_OG, groups = codes_OGR[..., stage], len(block_Gdd)
            weight_OG = p.weight_O[:, None].expand(-1, groups)
            pull_OGd = torch.einsum("ogj,gij->ogi", loss_OGd, block_Gdd) * weight_OG[..., None]
            slope_Kd.index_add_(0, code_OG.flatten(), pull_OGd.flatten(0, 1))
            cell_OG = code_OG * groups + torch.arange(groups, device=code_OG.device)
            mass_KG = loss_OGd.new_zeros(count * groups).index_add_(0, cell_OG.flatten(), weight_OG.flatten())
            curve_Kdd += (mass_KG.view(count, groups) @ (block_Gdd @ block_Gdd.mT).flatten(1)).view(count, d, d)
        # Entries that nobody uses, and directions that nobody feels, stay where they are.
        ridge_K = 1e-4 * curve_Kdd.diagonal(dim1=1, dim2=2).mean(1) + 1e-30
        curve_Kdd.diagonal(dim1=1, dim2=2).add_(ridge_K[:, None])
        move_Kd = torch.linalg.solve(curve_Kdd, slope_Kd)
        book_Kd += move_Kd.float()
        for p, codes_OGR, loss_OGd in zip(problems, codes, losses, strict=True):
            loss_OGd -= torch.einsum("ogi,gij->ogj", move_Kd[codes_OGR[..., stage]], p.metric.blocks_Gdd().double())
    return codebooks_RKd


def hottest_first(problems: list[Problem], codebooks_RKd: Tensor, beam: int) -> Tensor:
    """The codebooks sorted by how many vectors of the problems use an entry, most first: a kernel may cache those."""
    count = codebooks_RKd.shape[1]
    codes_NR = torch.cat([error_feedback(p, codebooks_RKd, beam)[0].flatten(0, 1) for p in problems])
    uses_R = [torch.bincount(code_N, minlength=count) for code_N in codes_NR.T]
    return torch.stack([b[u.argsort(descending=True, stable=True)] for b, u in zip(codebooks_RKd, uses_R, strict=True)])
