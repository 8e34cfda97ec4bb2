"""Weighted k-means in many groups at once, for codebooks of weights and of a KV cache.

Shape legend: P groups, each with N vectors of length d and K entries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# What finds the nearest entry (P, N), int64, of vectors (P, N, d) in codebooks (P, K, d).
Nearest = Callable[[Tensor, Tensor], Tensor]


def kmeans(
    x_PNd: Tensor,
    weight_PN: Tensor,
    count: int,
    rounds: int,
    nearest: Nearest,
    generator: torch.Generator,
    sample: int = 32,
    refill: bool = True,
) -> Tensor:
    """Codebooks (P, K, d): entries drawn by k-means++, then Lloyd's rounds.

    sample, refill: of `seed_entries` and `means`.
    """
    book_PKd = seed_entries(x_PNd, weight_PN, count, generator, sample)
    for _ in range(rounds):
        book_PKd = means(x_PNd, weight_PN, nearest(x_PNd, book_PKd), book_PKd, refill)
    return book_PKd


def seed_entries(x_PNd: Tensor, weight_PN: Tensor, count: int, generator: torch.Generator, sample: int = 32) -> Tensor:
    """Entries (P, K, d) drawn by k-means++ (Arthur and Vassilvitskii 2007): by weight times distance to those drawn.

    sample: vectors per entry that are drawn from; each draw costs a pass over them, and more make no better seeds.
    """
    groups, vectors, d = x_PNd.shape
    index = torch.randperm(vectors, generator=generator, device=generator.device)[: sample * count].to(x_PNd.device)
    x_PNd, weight_PN = x_PNd[:, index], weight_PN[:, index]
    draws_KP1 = torch.rand((count, groups, 1), generator=generator, device=generator.device, dtype=weight_PN.dtype)
    draws_KP1 = draws_KP1.to(x_PNd.device)
    book_PKd = x_PNd.new_empty((groups, count, d))
    distance_PN = torch.full_like(weight_PN, torch.inf)
    mass_PN = weight_PN
    for k in range(count):
        sum_PN = mass_PN.cumsum(1)
        at_P1 = torch.searchsorted(sum_PN, sum_PN[:, -1:] * draws_KP1[k], right=True).clamp(max=len(index) - 1)
        book_PKd[:, k] = x_PNd.gather(1, at_P1[..., None].expand(-1, -1, d))[:, 0]
        distance_PN = torch.minimum(distance_PN, (x_PNd - book_PKd[:, k, None]).square().sum(2))
        mass_PN = distance_PN * weight_PN
    return book_PKd


def means(x_PNd: Tensor, weight_PN: Tensor, code_PN: Tensor, book_PKd: Tensor, refill: bool = True) -> Tensor:
    """The weighted mean of each entry's vectors (P, K, d).

    Entries without vectors stay where they are, or with `refill` move to the vectors that cost most.
    """
    # Sums in float64 do not show the order of summation after rounding.
    weight_PN1, code_PNd = weight_PN.double()[..., None], code_PN[..., None].expand_as(x_PNd)
    mass_PK = weight_PN1.new_zeros(book_PKd.shape[:2]).scatter_add_(1, code_PN, weight_PN1[..., 0])
    sum_PKd = weight_PN1.new_zeros(book_PKd.shape).scatter_add_(1, code_PNd, weight_PN1 * x_PNd)
    new_PKd = torch.where(mass_PK[..., None] > 0, (sum_PKd / mass_PK[..., None]).float(), book_PKd)
    for p in (mass_PK == 0).any(1).nonzero()[:, 0].tolist() if refill else ():
        empty_K = (mass_PK[p] == 0).nonzero()[:, 0]
        cost_N = (x_PNd[p] - new_PKd[p, code_PN[p]]).square().sum(1) * weight_PN[p]
        worst_N = cost_N.topk(min(len(empty_K), len(cost_N))).indices
        new_PKd[p, empty_K[: len(worst_N)]] = x_PNd[p, worst_N]
    return new_PKd
