"""Codes of keys and values: the channels of a head in groups of neighbours, each group with a codebook of its own.

Coupled channels (CQ, arXiv 2405.03917, section 3): d channels that vary together take one code of 8 bits, 8 / d bits a
channel. Keys are coded before their rotary embedding where that can be seen, since a position then does not blur which
channels vary together (KVQuant, arXiv 2401.18079, section 3.1): they are turned back before the search, and turned
again when they are read.
Shape legend: B rows, Q heads of queries, H heads of keys and values, T tokens, D channels of a head, d channels of a
group, G = D / d groups, E entries, S splits of the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqcompress.codebooks.learned import lloyd, nearest

ENTRIES = 256


def turn(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor, back: bool = False) -> Tensor:
    """x with its rotary embedding, or without it again: channel i is turned with channel i + D/2 (RoFormer, 2104.09864).

    cos_BTD, sin_BTD: of each token's position, as transformers makes them, (B or 1, T, D). A factor that they carry
    (as YaRN's) is taken off again too.
    """
    cos, sin = cos_BTD[:, None].float(), sin_BTD[:, None].float()
    if back:
        size = cos.square() + sin.square()
        cos, sin = cos / size, -sin / size
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
    score_HGNE = torch.baddbmm(
        book.square().sum(-1).flatten(0, 1)[:, None] / 2, x_HGNd.flatten(0, 1), book.flatten(0, 1).mT, alpha=-1
    )
    code_HGN = score_HGNE.argmin(-1).to(torch.uint8).view(heads, groups, batch, tokens)
    return code_HGN.permute(2, 0, 3, 1).contiguous()


def decode(codes_BHTG: Tensor, book_HGEd: Tensor) -> Tensor:
    """The entries of codes, float32 (B, H, T, D)."""
    _, heads, _, groups = codes_BHTG.shape
    book = book_HGEd.float().expand(heads, groups, *book_HGEd.shape[2:])
    index_HG = torch.arange(heads * groups, device=codes_BHTG.device).view(heads, 1, groups) * book.shape[2]
    return book.flatten(0, 2)[index_HG + codes_BHTG.long()].flatten(-2)


def learn(x_NHD: Tensor, weight_NHD: Tensor | None, d: int, rounds: int, generator: torch.Generator) -> Tensor:
    """Codebooks (H, G, E, d) float16 of keys or values, by weighted k-means in every group.

    weight_NHD: what a unit error of a channel costs, such as its squared gradient (CQ, section 3.3); a group's vector
    weighs what its channels do together. None: all weigh the same.
    """
    tokens, heads, channels = x_NHD.shape
    found = x_NHD.new_empty((heads, channels // d, ENTRIES, d))
    ones_N = torch.ones(tokens, dtype=torch.float64, device=x_NHD.device)
    for h in range(heads):
        for g in range(channels // d):
            group = slice(g * d, (g + 1) * d)
            weight_N = ones_N if weight_NHD is None else weight_NHD[:, h, group].double().sum(1)
            found[h, g] = lloyd(x_NHD[:, h, group].contiguous(), weight_N, (1, ENTRIES, d), 1, rounds, generator)[0]
    return found.half()
