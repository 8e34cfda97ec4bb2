"""Tables of entries: the search in them, and learning them from the weights that they will encode.

Shape legend: O output rows, J input columns in the order of encoding, d vector length, G = J / d groups, R stages, K
entries of a stage, N vectors, M candidates of a beam, V = N · M, b entries looked at of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqcompress.methods.vq.ldlq import Problem, error_feedback

# Numbers in the largest temporary of a search.
CHUNK = 1 << 22
# Candidates up to which a pass over the entries for each is thought to cost less than a matrix of scores.
PASSES = 16


@dataclass(frozen=True)
class Book:
    """The quantizer of entries that are added up: codebooks_RKd, and the candidates kept between residual stages."""

    codebooks_RKd: Tensor
    beam: int

    @property
    def d(self) -> int:
        """Columns of a vector."""
        return self.codebooks_RKd.shape[2]

    def nearest(self, target_Od: Tensor, block_dd: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (O, R) and values (O, d)."""
        code_OR = nearest(target_Od, self.codebooks_RKd @ block_dd, self.beam)
        return code_OR, sum_entries(code_OR[:, None], self.codebooks_RKd)


def learn(
    problems: list[Problem],
    size: tuple[int, int, int],
    beam: int,
    iterations: int,
    refits: int,
    generator: torch.Generator,
) -> Tensor:
    """Codebooks (R, K, d) for weights like these, the hottest entry first: k-means, then what the search asks for.

    size: (R, K, d). iterations: rounds of k-means. refits: rounds of `refit`.
    """
    vectors_Nd = torch.cat([p.unit_OJ.reshape(-1, size[2]) for p in problems])
    weight_N = torch.cat([p.weight_OG().flatten() for p in problems])
    codebooks_RKd = lloyd(vectors_Nd, weight_N, size, beam, iterations, generator)
    for _ in range(refits):
        codebooks_RKd = refit(problems, codebooks_RKd, beam)
    return hottest_first(problems, codebooks_RKd, beam)


def nearest(target_Nd: Tensor, codebooks_RKd: Tensor, beam: int, kernel: bool | None = None) -> Tensor:
    """Codes (N, R), int64, of the entries whose sum is nearest to each target; a beam search from stage to stage.

    kernel: search by `kernels.nearest`, which never holds a score for every entry; unless said, on a GPU, and with no
    more candidates than it may have passes over the entries.
    """
    stages, count, d = codebooks_RKd.shape
    if kernel is None:
        kernel = target_Nd.is_cuda and (stages == 1 or beam <= PASSES)
    rows = max(1, CHUNK // ((max(beam, d) if kernel else count) * (beam if stages > 1 else 1)))
    if len(target_Nd) > rows:
        return torch.cat([nearest(chunk_Nd, codebooks_RKd, beam, kernel) for chunk_Nd in target_Nd.split(rows)])
    rest_NMd = target_Nd[:, None]
    codes_NMR = torch.empty((len(target_Nd), 1, 0), dtype=torch.int64, device=target_Nd.device)
    for stage, book_Kd in enumerate(codebooks_RKd):
        keep = 1 if stage == stages - 1 else min(beam, rest_NMd.shape[1] * count)
        # Half the squared distance, less |rest|² / 2 where there is one candidate, so that it does not matter.
        if kernel:
            from vqcompress.methods.vq import kernel_nearest as search

            # The best of all are among the best of each candidate.
            found_Vb, score_Vb = search.best(rest_NMd.reshape(-1, d), book_Kd, min(keep, count))
        else:
            score_Vb = torch.addmm(book_Kd.square().sum(1) / 2, rest_NMd.reshape(-1, d), book_Kd.T, alpha=-1)
        score_NMb = score_Vb.view(*rest_NMd.shape[:2], score_Vb.shape[1])
        if rest_NMd.shape[1] > 1:
            score_NMb += rest_NMd.square().sum(2, keepdim=True) / 2
        flat = score_NMb.flatten(1)
        best_NM = flat.argmin(1, keepdim=True) if keep == 1 else flat.topk(keep, 1, largest=False).indices
        origin_NM = best_NM // score_NMb.shape[2]
        code_NM = found_Vb.view(flat.shape).gather(1, best_NM).long() if kernel else best_NM % count
        before_NMR = codes_NMR.gather(1, origin_NM[..., None].expand(-1, -1, stage))
        codes_NMR = torch.cat([before_NMR, code_NM[..., None]], 2)
        rest_NMd = rest_NMd.gather(1, origin_NM[..., None].expand(-1, -1, d)) - book_Kd[code_NM]
    return codes_NMR[:, 0]


def sum_entries(codes_OGR: Tensor, codebooks_RKd: Tensor) -> Tensor:
    """Σ_r codebook[r, code_r], float32 (O, J), added in the order of the stages."""
    values_OGd = codebooks_RKd[0][codes_OGR[..., 0]]
    for stage in range(1, codes_OGR.shape[2]):
        values_OGd = values_OGd + codebooks_RKd[stage][codes_OGR[..., stage]]
    return values_OGd.flatten(1)


def sample_rows(weight_OI: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of the rows, at least one, in their order."""
    rows = len(weight_OI)
    index = torch.randperm(rows, generator=generator, device=generator.device)[: max(1, round(rows * min(share, 1)))]
    return weight_OI[index.sort().values.to(weight_OI.device)]


def lloyd(
    vectors_Nd: Tensor, weight_N: Tensor, size: tuple[int, int, int], beam: int, rounds: int, generator: torch.Generator
) -> Tensor:
    """Codebooks (R, K, d) by weighted k-means: stage after stage on what is left over, then all stages together."""
    weight_N = weight_N / weight_N.mean().clamp(min=torch.finfo(torch.float64).tiny) + 1e-9
    codebooks_RKd, (stages, _, _) = vectors_Nd.new_zeros(size), size
    rest_Nd = vectors_Nd
    for stage, book_Kd in enumerate(codebooks_RKd):
        book_Kd[:] = seed_entries(rest_Nd, weight_N, len(book_Kd), generator)
        for _ in range(rounds):
            code_N = nearest(rest_Nd, book_Kd[None], 1)[:, 0]
            book_Kd[:] = means(rest_Nd, weight_N, code_N, book_Kd)
        if stage < stages - 1:
            rest_Nd = rest_Nd - book_Kd[nearest(rest_Nd, book_Kd[None], 1)[:, 0]]
    for _ in range(rounds if stages > 1 else 0):
        codes_NR = nearest(vectors_Nd, codebooks_RKd, beam)
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
        found, value_OJ = error_feedback(p, Book(codebooks_RKd, beam))
        codes.append(torch.stack(found, 1))
        losses.append(((p.unit_OJ - value_OJ) @ p.metric.factor_JJ).view(len(value_OJ), -1, d).double())
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
    found = [torch.stack(error_feedback(p, Book(codebooks_RKd, beam))[0]).flatten(0, 1) for p in problems]
    uses_R = [torch.bincount(code_N, minlength=count) for code_N in torch.cat(found).T]
    return torch.stack([b[u.argsort(descending=True, stable=True)] for b, u in zip(codebooks_RKd, uses_R, strict=True)])
