"""Viterbi's algorithm on a CPU, compiled by numba.

A state is a window of a stream, its oldest bit lowest: s' = (s >> k) | (new bits << (states − k)). So the
states that lead to one class q of states are P·q … P·q + P − 1, P = 2**k, and class q holds the states q + u·Q, u < P.
Costs are laid out as (P, Q), state s at [s mod P, s div P]: then all inner loops run over neighbours in memory, and
vectorize.
Which predecessor was best rides in the lowest k bits of a cost, so that a minimum finds both.
Shape legend: N sequences or vectors, T weights of a sequence, S = 2**states, P and Q as above.
"""

from __future__ import annotations

import numpy as np
from numba import njit

FAR = np.float32(1e30)


def _compiled(function):  # type: ignore[no-untyped-def]
    """The function, compiled at its first call and kept on disk, or compiled in every process if no disk takes it."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package nor the user's cache can be written
        return njit(nogil=True)(function)


@_compiled
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


@_compiled
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
