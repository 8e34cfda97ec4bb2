"""Codes of keys and values: the channels of a head in groups of neighbours, each group with a codebook of its own.

Coupled channels (CQ, arXiv 2405.03917, section 3): d channels that vary together take one code of 8 bits, 8 / d bits a
channel. Keys are coded without their rotary embedding where that can be removed, since a position then does not blur
which channels vary together (KVQuant, arXiv 2401.18079, section 3.1).
Shape legend: B rows, Q heads of queries, H heads of keys and values, T tokens, D channels of a head, d channels of a
group, G = D / d groups, E entries, N tokens to learn from, P groups of all heads, R = Q / H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from vqcompress.kv_cache.rotary import apply_rope
from vqcompress.methods.vq.kmeans import kmeans

ENTRIES = 256
# Groups whose codebooks are learned in one batch.
AT_ONCE = 16
# Scores computed at once in a search: about what a CPU's cache holds, and 256 MB of a GPU.
CHUNK, GPU_CHUNK = 1 << 19, 1 << 26


def encode(x_BHTD: Tensor, book_HGEd: Tensor) -> Tensor:
    """Codes, uint8 (B, H, T, G): the nearest entry of each group's codebook, the first of equals."""
    (batch, _, tokens, _), (heads, groups, _, d) = x_BHTD.shape, book_HGEd.shape
    x_HGNd = x_BHTD.float().reshape(batch, heads, tokens, groups, d).permute(1, 3, 0, 2, 4).flatten(2, 3)
    code_PN = _nearest(x_HGNd.flatten(0, 1), book_HGEd.float().flatten(0, 1))
    code_HGN = code_PN.to(torch.uint8).view(heads, groups, batch, tokens)
    return code_HGN.permute(2, 0, 3, 1).contiguous()


def decode(codes_BHTG: Tensor, book_HGEd: Tensor) -> Tensor:
    """The entries of codes, float32 (B, H, T, D)."""
    heads, groups, entries, _ = book_HGEd.shape
    first_HTG = torch.arange(heads * groups, dtype=torch.int32, device=codes_BHTG.device).view(heads, 1, groups)
    # Several times as fast on a CPU as an index of int64.
    return embedding(first_HTG * entries + codes_BHTG.int(), book_HGEd.float().flatten(0, 2)).flatten(-2)


def learn(x_NHD: Tensor, weight_NHD: Tensor | None, d: int, rounds: int, generator: torch.Generator) -> Tensor:
    """Codebooks (H, G, E, d) float16 of keys or values, by weighted k-means in every group, all groups at once.

    weight_NHD: the cost of a unit error of each channel, such as its squared gradient (CQ, section 3.3); a group's
    vector weighs as much as its channels together. None: all weigh the same.
    """
    tokens, heads, channels = x_NHD.shape
    x_PNd = x_NHD.float().reshape(tokens, -1, d).transpose(0, 1).contiguous()
    weight_PN = torch.ones_like(x_PNd[..., 0])
    if weight_NHD is not None:
        weight_PN = weight_NHD.float().reshape(tokens, -1, d).sum(2).T
        weight_PN = weight_PN / weight_PN.mean(1, keepdim=True).clamp(min=1e-30) + 1e-3
    books = []
    for x, weight in zip(x_PNd.split(AT_ONCE), weight_PN.split(AT_ONCE), strict=True):
        books.append(kmeans(x, weight, ENTRIES, rounds, _nearest, generator, sample=16, refill=False))
    return torch.cat(books).view(heads, channels // d, ENTRIES, d).half()


def _nearest(x_PNd: Tensor, book_PEd: Tensor) -> Tensor:
    """The nearest entry (P, N) of every group's vectors."""
    half_P1E = book_PEd.square().sum(2)[:, None] / 2
    rows = max(1, (GPU_CHUNK if x_PNd.is_cuda else CHUNK) // (len(x_PNd) * book_PEd.shape[1]))
    return torch.cat([torch.baddbmm(half_P1E, x, book_PEd.mT, alpha=-1).argmin(2) for x in x_PNd.split(rows, 1)], 1)


def weigh(q_BQD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention of one query a row: values (B, Q, D) and logarithms of the sums of exponentials (B, Q), float32.

    Q / H queries that follow one another share a head. Without tokens 0 and −∞. scaling: of scores.
    """
    batch, heads, _, channels = k_BHTD.shape
    score_BHRT = q_BQD.float().view(batch, heads, -1, channels) @ k_BHTD.float().mT * scaling
    lse_BHR = score_BHRT.logsumexp(-1)
    weight_BHRT = (score_BHRT - lse_BHR[..., None]).exp()
    return (weight_BHRT @ v_BHTD.float()).flatten(1, 2), lse_BHR.flatten(1)


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Attention (B, Q, D) to two sets of tokens as one; of each the result of `weigh`."""
    (one_BQD, one_BQ), (two_BQD, two_BQ) = first, second
    share_BQ = (two_BQ - torch.logaddexp(one_BQ, two_BQ)).exp()
    return torch.lerp(one_BQD, two_BQD, share_BQ[..., None])


@torch.library.custom_op("vqcompress::kv_attend", mutates_args=())
def attend(
    q_BQD: Tensor, codes: list[Tensor], books: list[Tensor], angles: list[Tensor], start: int, end: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """`weigh` of the coded tokens from `start` on and before `end`.

    codes: of keys and of values, uint8 (B, H, T, G). books: their codebooks (H, G, E, d). angles: cos and sin
    (B or 1, T, D) if keys were coded without their rotary embedding, else none.
    """
    span = slice(start, max(start, end))
    k_BHTD, v_BHTD = (decode(code[:, :, span], book) for code, book in zip(codes, books, strict=True))
    if angles:
        k_BHTD = apply_rope(k_BHTD, (angles[0][:, span], angles[1][:, span]))
    return weigh(q_BQD, k_BHTD, v_BHTD, scaling)


@attend.register_fake
def _(q_BQD: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    out_BQD = q_BQD.new_empty(q_BQD.shape, dtype=torch.float32)
    return out_BQD, out_BQD.new_empty(out_BQD.shape[:2])


@attend.register_kernel("cuda")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    from vqcompress.kv_cache import kernel

    return kernel.attend(*arguments)
