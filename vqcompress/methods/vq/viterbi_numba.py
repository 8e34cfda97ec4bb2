"""What wants compiled code on a CPU, by numba: Viterbi's algorithm, words of E8P, attention to coded keys and values.

Viterbi. A state is a window of a stream, its oldest bit lowest: s' = (s >> k) | (new bits << (states − k)). So the
states that lead to one class q of states are P·q … P·q + P − 1, P = 2**k, and class q holds the states q + u·Q, u < P.
Costs are laid out as (P, Q), state s at [s mod P, s div P]: then all inner loops run over neighbours in memory, and
vectorize.
Which predecessor was best rides in the lowest k bits of a cost, so that a minimum finds both.
Shape legend: N sequences or vectors, T weights of a sequence, S = 2**states, P and Q as above; A patterns of E8P. Of
attention: as in `codebooks.kv`, W = d / 2 pairs of channels of an entry.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing import current_process

import numpy as np
from numba import njit

FAR = np.float32(1e30)
# Sums in any order, so that they vectorize; infinities stay what they are.
SUMS = {"reassoc", "contract", "nsz"}
# Numbers that are compared at once.
LANES = 16


@cache
def _pool(threads: int, process: int | None) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def pool(threads: int) -> ThreadPoolExecutor:
    """Threads for what is compiled, which holds no lock. A fork has none of its parent's."""
    return _pool(threads, current_process().ident)


def in_shares(call: Callable[[int, int], object], count: int, threads: int) -> None:
    """Call with (first, last) of every thread's share of a range."""
    threads = max(1, min(threads, count))
    if threads == 1:
        call(0, count)
    else:
        bounds = [count * n // threads for n in range(threads + 1)]
        list(pool(threads).map(call, bounds[:-1], bounds[1:]))


@njit(nogil=True, cache=True)
def _steps(x_T, words, k, cost, back_TQ):  # type: ignore[no-untyped-def]  # pragma: no cover (compiled)
    """Add the cost of every weight of x to the costs of the states (S,), and note the predecessors."""
    ways = 1 << k
    classes = len(cost) >> k
    run = classes >> k
    number = cost.view(np.int32)
    best = np.empty(classes, np.float32)
    best_number = best.view(np.int32)
    turned = np.empty(classes, np.float32)
    low = np.int32(ways - 1)
    high = np.int32(~low)
    for t in range(len(x_T)):
        back = back_TQ[t]
        from_0 = number[:classes]
        for q in range(classes):
            best_number[q] = np.int32(from_0[q] & high)
        for p in range(1, ways):
            mark = np.int32(p)
            from_p = number[p * classes : (p + 1) * classes]
            for q in range(classes):
                candidate = np.int32(np.int32(from_p[q] & high) | mark)
                # Positive floats are in the order of their bits.
                best_number[q] = candidate if candidate < best_number[q] else best_number[q]
        for q in range(classes):
            back[q] = np.uint8(np.int32(best_number[q] & low))
        for p in range(ways):
            row, source = turned[p * run : (p + 1) * run], best[p:]
            for j in range(run):
                row[j] = source[j << k]
        x = x_T[t]
        for p in range(ways):
            row = turned[p * run : (p + 1) * run]
            for u in range(ways):
                at = p * classes + u * run
                to, word = cost[at : at + run], words[at : at + run]
                for j in range(run):
                    rest = x - word[j]
                    to[j] = row[j] + rest * rest


@njit(nogil=True, cache=True)
def paths(x_NT, words_S, states, k, margin):  # type: ignore[no-untyped-def]  # pragma: no cover (compiled)
    """Codes (N, T), int32 below 2**k: for each sequence a cyclic stream whose values have nearly the least squares.

    A first pass over `margin` weights on either side of the seam chooses the bits that both ends share; with them
    given, the second pass is exact (the approximation of QTIP, section 3.2, which takes whole sequences for the first).
    """
    sequences, length = x_NT.shape
    ways, classes = 1 << k, 1 << (states - k)
    margin = min(margin, length)
    words = np.empty_like(words_S)
    for s in range(len(words_S)):
        words[(s & (ways - 1)) * classes + (s >> k)] = words_S[s]
    cost = np.empty(1 << states, np.float32)
    back_TQ = np.empty((max(length, 2 * margin), classes), np.uint8)
    seam = np.empty(2 * margin, np.float32)
    codes_NT = np.empty((sequences, length), np.int32)
    for n in range(sequences):
        seam[:margin], seam[margin:] = x_NT[n, length - margin :], x_NT[n, :margin]
        cost[:] = 0
        _steps(seam, words, k, cost, back_TQ)
        best = np.argmin(cost)
        state = ((best % classes) << k) | (best // classes)
        for t in range(2 * margin - 1, margin - 1, -1):
            state = ((state & (classes - 1)) << k) | back_TQ[t, state & (classes - 1)]
        shared = state >> k
        cost[:] = FAR
        for p in range(ways):
            cost[p * classes + shared] = 0
        _steps(x_NT[n], words, k, cost, back_TQ)
        end = 0
        for p in range(1, ways):
            if cost[p * classes + shared] < cost[end * classes + shared]:
                end = p
        state = (shared << k) | end
        for t in range(length - 1, -1, -1):
            # The lowest bits of a state are the first that its window holds: those of its own weight.
            codes_NT[n, t] = state & (ways - 1)
            state = ((state & (classes - 1)) << k) | back_TQ[t, state & (classes - 1)]
    return codes_NT


@njit(nogil=True, cache=True, fastmath=SUMS)
def nearest_entries(first, last, x_BHTD, book_HGEd, out_BHTG):  # type: ignore[no-untyped-def]  # pragma: no cover (compiled)
    """`kv.encode` into out, of the groups of all heads from the first on and before the last.

    The entries lie in rows of LANES, so that every pass over them is over neighbours.
    """
    (batch, _, tokens, groups), (_, _, count, d) = out_BHTG.shape, book_HGEd.shape
    # One head or group of a codebook stands for all.
    of_head, of_group = len(book_HGEd) > 1, book_HGEd.shape[1] > 1
    book_dE, half_E, cost_E = np.empty((d, count), np.float32), np.empty(count, np.float32), np.empty(count, np.float32)
    least_L = np.empty(LANES, np.float32)
    for p in range(first, last):
        h, g = p // groups, p % groups
        half_E[:] = 0
        for e in range(count):
            for j in range(d):
                book_dE[j, e] = book_HGEd[h * of_head, g * of_group, e, j]
                half_E[e] += np.float32(0.5) * book_dE[j, e] * book_dE[j, e]
        for b in range(batch):
            for t in range(tokens):
                for e in range(count):
                    cost_E[e] = half_E[e] - x_BHTD[b, h, t, g * d] * book_dE[0, e]
                for j in range(1, d):
                    x = x_BHTD[b, h, t, g * d + j]
                    for e in range(count):
                        cost_E[e] -= x * book_dE[j, e]
                for lane in range(LANES):
                    least_L[lane] = cost_E[lane]
                for row in range(1, count // LANES):
                    for lane in range(LANES):
                        cost = cost_E[row * LANES + lane]
                        least_L[lane] = cost if cost < least_L[lane] else least_L[lane]
                best, code = least_L[0], count
                for lane in range(1, LANES):
                    best = min(best, least_L[lane])
                for lane in range(LANES):
                    if least_L[lane] == best:
                        row = 0
                        while cost_E[row * LANES + lane] > best:
                            row += 1
                        code = min(code, row * LANES + lane)
                out_BHTG[b, h, t, g] = code


@njit(nogil=True, cache=True, fastmath=SUMS)
def attend(  # type: ignore[no-untyped-def]  # pragma: no cover (compiled)
    of,
    to,
    first,
    last,
    q_BHRD,
    codes_k,
    book_k,
    codes_v,
    book_v,
    mask_BT,
    cos_BTD,
    sin_BTD,
    scale_k,
    scale_v,
    out_BHRD,
    lse_BHR,
):
    """`kv.attend` into out and lse, of the pairs of a row and a head from `of` on and before `to`.

    Queries carry the scaling. Books are int64 (H, G, E, W); what is absent is empty.
    """
    (_, heads, repeat, channels), groups, words = q_BHRD.shape, codes_k.shape[3], book_k.shape[3]
    of_head, of_group = len(book_k) > 1, book_k.shape[1] > 1
    half, count = channels // 2, max(last - first, 0)
    pairs, turned = np.empty(half, np.int64), np.empty(channels, np.float32)
    entry, score_RT = pairs.view(np.float32), np.empty((repeat, count), np.float32)
    for pair in range(of, to):
        b, h = pair // heads, pair % heads
        top_R = np.full(repeat, -np.inf, np.float32)
        for t in range(count):
            if len(mask_BT) and not mask_BT[b, first + t]:
                score_RT[:, t] = -np.inf
                continue
            for g in range(groups):
                code = codes_k[b, h, first + t, g]
                for w in range(words):
                    pairs[g * words + w] = book_k[h * of_head, g * of_group, code, w]
            key = entry
            if len(cos_BTD):
                cos, sin = cos_BTD[b % len(cos_BTD), first + t], sin_BTD[b % len(sin_BTD), first + t]
                for c in range(half):
                    turned[c] = entry[c] * cos[c] - entry[c + half] * sin[c]
                    turned[c + half] = entry[c + half] * cos[c] + entry[c] * sin[c]
                key = turned
            size = scale_k[b, h, first + t] if len(scale_k) else np.float32(1)
            for r in range(repeat):
                dot = np.float32(0)
                for c in range(channels):
                    dot += q_BHRD[b, h, r, c] * key[c]
                score_RT[r, t] = dot * size
                top_R[r] = max(top_R[r], dot * size)
        out_BHRD[b, h] = 0
        for r in range(repeat):
            total = np.float32(0)
            for t in range(count):
                weight = np.exp(score_RT[r, t] - top_R[r]) if top_R[r] > -np.inf else np.float32(0)
                score_RT[r, t] = weight
                total += weight
            lse_BHR[b, h, r] = top_R[r] + np.log(total) if total > 0 else -np.inf
            if total > 0:
                score_RT[r] /= total
        for t in range(count):
            for g in range(groups):
                code = codes_v[b, h, first + t, g]
                for w in range(words):
                    pairs[g * words + w] = book_v[h * of_head, g * of_group, code, w]
            size = scale_v[b, h, first + t] if len(scale_v) else np.float32(1)
            for r in range(repeat):
                weight = score_RT[r, t] * size
                for c in range(channels):
                    out_BHRD[b, h, r, c] += weight * entry[c]
