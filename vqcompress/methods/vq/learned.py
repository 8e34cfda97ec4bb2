"""Learned codebooks: the search for the nearest sum of entries, and training on the weights that will be encoded.

Shape legend: O output rows, J input columns in the order of encoding, d vector length, G = J / d groups, R stages, K
entries of a stage, N vectors, M candidates of a beam, b entries that are scored for each candidate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqcompress.methods.feedback import ldlq
from vqcompress.methods.vq.kmeans import kmeans, means
from vqcompress.methods.vq.scales import LDLQProblem

# Numbers in the largest temporary of a search.
CHUNK = 1 << 22


@dataclass(frozen=True)
class CodebookSearch:
    """The quantizer of sums of entries. beam: candidates that are kept between residual stages."""

    codebooks_RKd: Tensor
    beam: int

    def nearest(self, target_Od: Tensor, block_dd: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Codes (O, R) and values (O, d)."""
        code_OR = nearest(target_Od, self.codebooks_RKd @ block_dd, self.beam)
        return code_OR, sum_entries(code_OR[:, None], self.codebooks_RKd)


def nearest(target_Nd: Tensor, codebooks_RKd: Tensor, beam: int, kernel: bool | None = None) -> Tensor:
    """Codes (N, R), int64, of the entries whose sum is nearest to each target; a beam search from stage to stage.

    kernel: search by `kernel_nearest`, which never stores a score for every entry. Default: on a GPU.
    """
    stages, count, d = codebooks_RKd.shape
    kernel = target_Nd.is_cuda if kernel is None else kernel
    rows = max(1, CHUNK // ((max(beam, d) if kernel else count) * (beam if stages > 1 else 1)))
    return torch.cat([_beam_search(chunk_Nd, codebooks_RKd, beam, kernel) for chunk_Nd in target_Nd.split(rows)])


def _beam_search(target_Nd: Tensor, codebooks_RKd: Tensor, beam: int, kernel: bool) -> Tensor:
    """`nearest` of as many targets as fit into memory at once."""
    stages, count, _ = codebooks_RKd.shape
    rest_NMd = target_Nd[:, None]
    codes_NMR = torch.empty((len(target_Nd), 1, 0), dtype=torch.int64, device=target_Nd.device)
    for stage, book_Kd in enumerate(codebooks_RKd):
        keep = 1 if stage == stages - 1 else min(beam, rest_NMd.shape[1] * count)
        origin_NM, code_NM = _extend(rest_NMd, book_Kd, keep, kernel)
        before_NMR = codes_NMR.gather(1, origin_NM[..., None].expand(-1, -1, stage))
        codes_NMR = torch.cat([before_NMR, code_NM[..., None]], 2)
        rest_NMd = rest_NMd.gather(1, origin_NM[..., None].expand(-1, -1, rest_NMd.shape[2])) - book_Kd[code_NM]
    return codes_NMR[:, 0]


def _extend(rest_NMd: Tensor, book_Kd: Tensor, keep: int, kernel: bool) -> tuple[Tensor, Tensor]:
    """The best `keep` candidates of the next stage, (N, keep) each: which candidate each extends, and by which entry.

    A score is half the squared distance; with a single candidate, less |rest|² / 2, which then changes no choice.
    """
    vectors_Vd = rest_NMd.reshape(-1, rest_NMd.shape[2])
    if kernel:
        from vqcompress.methods.vq import kernel_nearest

        # The best of all are among the best of each candidate.
        code_Vb, score_Vb = kernel_nearest.best(vectors_Vd, book_Kd, min(keep, len(book_Kd)))
    else:
        score_Vb = torch.addmm(book_Kd.square().sum(1) / 2, vectors_Vd, book_Kd.T, alpha=-1)
    entries = score_Vb.shape[1]
    score_NMb = score_Vb.view(*rest_NMd.shape[:2], entries)
    if rest_NMd.shape[1] > 1:
        score_NMb += rest_NMd.square().sum(2, keepdim=True) / 2
    flat = score_NMb.flatten(1)
    best_NM = flat.argmin(1, keepdim=True) if keep == 1 else flat.topk(keep, 1, largest=False).indices
    code_NM = code_Vb.view(flat.shape).gather(1, best_NM).long() if kernel else best_NM % entries
    return best_NM // entries, code_NM


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


def learn(
    problems: list[LDLQProblem],
    size: tuple[int, int, int],
    beam: int,
    iterations: int,
    updates: int,
    generator: torch.Generator,
) -> Tensor:
    """Codebooks (R, K, d) for weights like these, most used entry first: k-means, then updates under error feedback.

    size: (R, K, d). iterations: rounds of k-means. updates: rounds of `update_codebooks`.
    """
    vectors_Nd = torch.cat([p.unit_OJ.reshape(-1, size[2]) for p in problems])
    weight_N = torch.cat([p.weight_OG().flatten() for p in problems])
    codebooks_RKd = _residual_kmeans(vectors_Nd, weight_N, size, beam, iterations, generator)
    for _ in range(updates):
        codebooks_RKd = update_codebooks(problems, codebooks_RKd, beam)
    return most_used_first(problems, codebooks_RKd, beam)


def _residual_kmeans(
    vectors_Nd: Tensor, weight_N: Tensor, size: tuple[int, int, int], beam: int, rounds: int, generator: torch.Generator
) -> Tensor:
    """Codebooks (R, K, d) by weighted k-means: stage after stage on what is left over, then all stages together."""
    weight_N = weight_N / weight_N.mean().clamp(min=torch.finfo(torch.float64).tiny) + 1e-9
    codebooks_RKd, (stages, count, _) = vectors_Nd.new_zeros(size), size

    def search(x_PNd: Tensor, book_PKd: Tensor) -> Tensor:
        return nearest(x_PNd[0], book_PKd, 1).T

    rest_Nd = vectors_Nd
    for stage, book_Kd in enumerate(codebooks_RKd):
        book_Kd[:] = kmeans(rest_Nd[None], weight_N[None], count, rounds, search, generator)[0]
        if stage < stages - 1:
            rest_Nd = rest_Nd - book_Kd[nearest(rest_Nd, book_Kd[None], 1)[:, 0]]
    for _ in range(rounds if stages > 1 else 0):
        codes_NR = nearest(vectors_Nd, codebooks_RKd, beam)
        for stage, book_Kd in enumerate(codebooks_RKd):
            code_N = codes_NR[:, stage]
            rest_Nd = vectors_Nd - sum_entries(codes_NR[:, None], codebooks_RKd) + book_Kd[code_N]
            book_Kd[:] = means(rest_Nd[None], weight_N[None], code_N[None], book_Kd[None])[0]
    return codebooks_RKd


def update_codebooks(problems: list[LDLQProblem], codebooks_RKd: Tensor, beam: int) -> Tensor:
    """Codebooks moved to the least squares of the vectors that they encode with feedback, weighted by the Hessian.

    With the loss L = E B, group g of row o loses |L_og − δ B_gg|² · weight_o if its entry moves by δ. So δ solves
    (Σ weight_o B_gg B_ggᵀ) δ = Σ weight_o B_gg L_og over the vectors of the entry, stage by stage (the codebook update
    of GPTVQ, section 3.2, in closed form and inside the feedback).
    """
    codebooks_RKd, (_, count, d) = codebooks_RKd.clone(), codebooks_RKd.shape
    codes, losses = [], []
    for p in problems:
        chosen, value_OJ = ldlq(p.unit_OJ, p.factor, CodebookSearch(codebooks_RKd, beam))
        codes.append(torch.stack(chosen, 1))
        losses.append(((p.unit_OJ - value_OJ) @ p.factor.factor_JJ).view(len(value_OJ), -1, d).double())
    for stage, book_Kd in enumerate(codebooks_RKd):
        curve_Kdd = losses[0].new_zeros((count, d, d))
        slope_Kd = losses[0].new_zeros((count, d))
        for p, codes_OGR, loss_OGd in zip(problems, codes, losses, strict=True):
            block_Gdd = p.factor.blocks_Gdd().double()
            code_OG, groups = codes_OGR[..., stage], len(block_Gdd)
            weight_OG = p.weight_O[:, None].expand(-1, groups)
            pull_OGd = torch.einsum("ogj,gij->ogi", loss_OGd, block_Gdd) * weight_OG[..., None]
            slope_Kd.index_add_(0, code_OG.flatten(), pull_OGd.flatten(0, 1))
            cell_OG = code_OG * groups + torch.arange(groups, device=code_OG.device)
            mass_KG = loss_OGd.new_zeros(count * groups).index_add_(0, cell_OG.flatten(), weight_OG.flatten())
            curve_Kdd += (mass_KG.view(count, groups) @ (block_Gdd @ block_Gdd.mT).flatten(1)).view(count, d, d)
        # Unused entries, and directions that cost nothing, stay where they are.
        ridge_K = 1e-4 * curve_Kdd.diagonal(dim1=1, dim2=2).mean(1) + 1e-30
        curve_Kdd.diagonal(dim1=1, dim2=2).add_(ridge_K[:, None])
        move_Kd = torch.linalg.solve(curve_Kdd, slope_Kd)
        book_Kd += move_Kd.float()
        for p, codes_OGR, loss_OGd in zip(problems, codes, losses, strict=True):
            loss_OGd -= torch.einsum("ogi,gij->ogj", move_Kd[codes_OGR[..., stage]], p.factor.blocks_Gdd().double())
    return codebooks_RKd


def most_used_first(problems: list[LDLQProblem], codebooks_RKd: Tensor, beam: int) -> Tensor:
    """The codebooks sorted by how many vectors use an entry, most first, so that a kernel can cache those."""
    count = codebooks_RKd.shape[1]
    found = [
        torch.stack(ldlq(p.unit_OJ, p.factor, CodebookSearch(codebooks_RKd, beam))[0]).flatten(0, 1) for p in problems
    ]
    uses_R = [torch.bincount(code_N, minlength=count) for code_N in torch.cat(found).T]
    return torch.stack([b[u.argsort(descending=True, stable=True)] for b, u in zip(codebooks_RKd, uses_R, strict=True)])
