"""Codes of keys and values: the channels of a head in groups of neighbours, each group with a codebook of its own.

Coupled channels (CQ, arXiv 2405.03917, section 3): d channels that vary together take one code of 8 bits, 8 / d bits a
channel. Keys are coded before their rotary embedding where that can be seen, since a position then does not blur which
channels vary together (KVQuant, arXiv 2401.18079, section 3.1): they are turned back before the search, and turned
again when they are read.
Shape legend: B rows, Q heads of queries, H heads of keys and values, T tokens, D channels of a head, d channels of a
group, G = D / d groups, E entries, N tokens to learn from, P groups of all heads, R = Q / H.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from vqcompress.kv_cache.coded_tokens import CodedTokens
from vqcompress.kv_cache.gaussian import entries
from vqcompress.methods.hadamard import hadamard, random_signs
from vqcompress.methods.vq.kmeans import kmeans

BITS = 8
ENTRIES = 1 << BITS
# Groups whose codebooks are learned in one batch.
AT_ONCE = 16
# Scores computed at once in a search: about what a CPU's cache holds.
CHUNK = 1 << 19


def apply_rope(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor, inverse: bool = False) -> Tensor:
    """x in float32 with its rotary embedding: channel i turns with channel i + D/2 (arXiv 2104.09864).

    cos_BTD, sin_BTD: of each token's position, as transformers makes them, (B or 1, T, D). inverse: remove the
    embedding instead, and a scale that cos and sin carry (YaRN) with it.
    """
    cos, sin = cos_BTD[:, None].float(), sin_BTD[:, None].float()
    if inverse:
        square = cos.square() + sin.square()
        cos, sin = cos / square, -sin / square
    x_BHTD = x_BHTD.float()
    first, second = x_BHTD.chunk(2, -1)
    return x_BHTD * cos + torch.cat([-second, first], -1) * sin


def encode(x_BHTD: Tensor, book_HGEd: Tensor) -> Tensor:
    """Codes, uint8 (B, H, T, G): the nearest entry of each group's codebook, the first of equals.

    book_HGEd: float; one head or group stands for all.
    """
    (batch, heads, tokens, channels), (_, _, count, d) = x_BHTD.shape, book_HGEd.shape
    groups = channels // d
    book = book_HGEd.float().expand(heads, groups, count, d)
    x_HGNd = x_BHTD.float().reshape(batch, heads, tokens, groups, d).permute(1, 3, 0, 2, 4).flatten(2, 3)
    code_PN = _nearest(x_HGNd.flatten(0, 1), book.flatten(0, 1))
    code_HGN = code_PN.to(torch.uint8).view(heads, groups, batch, tokens)
    return code_HGN.permute(2, 0, 3, 1).contiguous()


def decode(codes_BHTG: Tensor, book_HGEd: Tensor) -> Tensor:
    """The entries of codes, float32 (B, H, T, D)."""
    _, heads, _, groups = codes_BHTG.shape
    book = book_HGEd.float().expand(heads, groups, *book_HGEd.shape[2:])
    first_HTG = torch.arange(heads * groups, dtype=torch.int32, device=codes_BHTG.device).view(heads, 1, groups)
    # Several times as fast on a CPU as an index of int64.
    return embedding(first_HTG * book.shape[2] + codes_BHTG.int(), book.flatten(0, 2)).flatten(-2)


@cache
def gaussian(d: int, device: torch.device) -> Tensor:
    """The universal codebook (1, 1, E, d) of 8 / d bits a channel."""
    with torch.inference_mode(False):
        return entries(d).to(device)[None, None]


@cache
def rotation(channels: int, device: torch.device) -> Tensor:
    """Signs, then the Hadamard transform, as an orthonormal matrix (D, D) for x @ it: the same for all models."""
    with torch.inference_mode(False):
        draw = torch.Generator().manual_seed(channels)
        return hadamard(random_signs(channels, draw).diag()).to(device)


def encode_unrotated(
    x_BHTD: Tensor, book_HGEd: Tensor, cos_BTD: Tensor | None = None, sin_BTD: Tensor | None = None
) -> Tensor:
    """`encode` of x without its rotary embedding, which cos and sin describe; by the kernel on a GPU."""
    if x_BHTD.is_cuda:
        return torch.ops.vqcompress.kv_encode(x_BHTD, book_HGEd, cos_BTD, sin_BTD)
    if cos_BTD is not None and sin_BTD is not None:
        x_BHTD = apply_rope(x_BHTD, cos_BTD, sin_BTD, inverse=True)
    return encode(x_BHTD, book_HGEd)


def learn(x_NHD: Tensor, weight_NHD: Tensor | None, d: int, rounds: int, generator: torch.Generator) -> Tensor:
    """Codebooks (H, G, E, d) float16 of keys or values, by weighted k-means in every group, all groups at once.

    weight_NHD: what a unit error of a channel costs, such as its squared gradient (CQ, section 3.3); a group's vector
    weighs what its channels do together. None: all weigh the same.
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
    rows = max(1, CHUNK // (len(x_PNd) * book_PEd.shape[1]))
    return torch.cat([torch.baddbmm(half_P1E, x, book_PEd.mT, alpha=-1).argmin(2) for x in x_PNd.split(rows, 1)], 1)


def weigh(
    q_BQD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    scaling: float,
    mask_BT: Tensor | None = None,
    scale_k: Tensor | None = None,
    scale_v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query a row: values (B, Q, D) and logarithms of the sums of exponentials (B, Q).

    Both in float32, or float64 if q is. mask_BT: True where a token counts; what may attend to nothing gets 0 and −∞.
    scale_k, scale_v: what keys and values are multiplied by, (B, H, T).
    """
    (batch, heads), dtype = k_BHTD.shape[:2], torch.promote_types(q_BQD.dtype, torch.float32)
    score_BHRT = q_BQD.to(dtype).view(batch, heads, -1, q_BQD.shape[-1]) @ k_BHTD.to(dtype).mT * scaling
    if scale_k is not None:
        score_BHRT *= scale_k[:, :, None]
    if mask_BT is not None:
        score_BHRT = score_BHRT.masked_fill(~mask_BT[:, None, None], -torch.inf)
    lse_BHR = score_BHRT.logsumexp(-1)
    weight_BHRT = (score_BHRT - lse_BHR.masked_fill(lse_BHR.isneginf(), 0)[..., None]).exp()
    if scale_v is not None:
        weight_BHRT *= scale_v[:, :, None]
    return (weight_BHRT @ v_BHTD.to(dtype)).flatten(1, 2), lse_BHR.flatten(1)


def attend(q_BQD: Tensor, tokens: CodedTokens, scaling: float) -> tuple[Tensor, Tensor]:
    """`weigh` of coded tokens. Q / H queries that follow one another share a head. scaling: of scores."""
    span = slice(tokens.start, max(tokens.start, tokens.end))
    k_BHTD, v_BHTD = (
        decode(tokens.codes_k[:, :, span], tokens.book_k),
        decode(tokens.codes_v[:, :, span], tokens.book_v),
    )
    if tokens.cos_BTD is not None and tokens.sin_BTD is not None:
        k_BHTD = apply_rope(k_BHTD, tokens.cos_BTD[:, span], tokens.sin_BTD[:, span])
    optional = (tokens.mask_BT, tokens.scale_k, tokens.scale_v)
    return weigh(q_BQD, k_BHTD, v_BHTD, scaling, *(None if part is None else part[..., span] for part in optional))


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to two sets of tokens as one, each as `weigh` gives it."""
    (one_BQD, one_BQ), (two_BQD, two_BQ) = first, second
    lse_BQ = torch.logaddexp(one_BQ, two_BQ)
    share_BQ = (two_BQ - lse_BQ.masked_fill(lse_BQ.isneginf(), 0)).exp()
    return torch.lerp(one_BQD, two_BQD, share_BQ[..., None]), lse_BQ


@torch.library.custom_op("vqcompress::kv_encode", mutates_args=())
def kv_encode(x_BHTD: Tensor, book_HGEd: Tensor, cos_BTD: Tensor | None, sin_BTD: Tensor | None) -> Tensor:
    """`encode_unrotated`, as an operator."""
    return encode_unrotated(x_BHTD, book_HGEd, cos_BTD, sin_BTD)


@kv_encode.register_fake
def _(x_BHTD: Tensor, book_HGEd: Tensor, *angles: object) -> Tensor:
    return x_BHTD.new_empty((*x_BHTD.shape[:3], x_BHTD.shape[3] // book_HGEd.shape[3]), dtype=torch.uint8)


@torch.library.custom_op("vqcompress::kv_attend", mutates_args=())
def kv_attend(
    q_BQD: Tensor, stored: Sequence[Tensor], optional: Sequence[Tensor | None], start: int, end: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """`attend`, as an operator. stored, optional: the tensors of `CodedTokens` in its order."""
    return attend(q_BQD, _tokens(stored, optional, start, end), scaling)


@kv_attend.register_fake
def _(q_BQD: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    out_BQD = q_BQD.new_empty(q_BQD.shape, dtype=torch.promote_types(q_BQD.dtype, torch.float32))
    return out_BQD, out_BQD.new_empty(out_BQD.shape[:2])


@kv_encode.register_kernel("cuda")
def _(*arguments: Any) -> Tensor:
    from vqcompress.kv_cache import kernel_encode

    return kernel_encode.encode(*arguments)


@kv_attend.register_kernel("cuda")
def _(q_BQD: Tensor, stored: Any, optional: Any, start: int, end: int, scaling: float) -> tuple[Tensor, Tensor]:
    from vqcompress.kv_cache import kernel

    return kernel.attend(q_BQD, _tokens(stored, optional, start, end), scaling)


def _tokens(stored: Sequence[Tensor], optional: Sequence[Tensor | None], start: int, end: int) -> CodedTokens:
    codes_k, book_k, codes_v, book_v = stored
    return CodedTokens(codes_k, book_k, codes_v, book_v, start, end, *optional)


def attend_by_kernel(q_BQD: Tensor, tokens: CodedTokens, scaling: float) -> tuple[Tensor, Tensor]:
    """`attend`, by the kernel on a GPU."""
    if not q_BQD.is_cuda:
        return attend(q_BQD, tokens, scaling)
    return torch.ops.vqcompress.kv_attend(q_BQD, tokens[:4], tokens[6:], tokens.start, tokens.end, scaling)
