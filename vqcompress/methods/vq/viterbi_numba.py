"""Viterbi's algorithm on a CPU, compiled by numba.

A state is a window of a stream, its oldest bit lowest: s' = (s >> k) | (new bits << (states − k)). So the
states that lead to one class q of states are P·q … P·q + P − 1, P = 2**k, and class q holds the states q + u·Q, u < P.
What is carried from weight to weight is not the cost of every state but the least of every class, Q numbers: a state's
cost is that of the class that it comes from plus its own. With q = u·J + j = i·P + p, a step is

    least'[u, j] = min over p of (least[p, j] + (x − word[p, u, j])²),  then  least[p, i] is least'[u, j],

whose loop over j runs over neighbours in memory, and vectorizes. Which way p was best rides in the lowest k bits of a
cost, so that a minimum finds both.
Shape legend: N sequences or vectors, T weights of a sequence, S = 2**states, P and Q as above, J = Q / P.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

FAR = np.float32(1e30)


def _compiled(function):  # type: ignore[no-untyped-def]
    """The function, compiled at its first call and kept on disk, or compiled in every process if no disk takes it."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package nor the user's cache can be written
        return njit(nogil=True)(function)


@intrinsic
def _bits(_, number):  # type: ignore[no-untyped-def]  # pragma: no cover (compiled)
    """The bits of a float32 as int32."""
    return types.int32(types.float32), lambda _, builder, __, values: builder.bitcast(values[0], ir.IntType(32))


def _search(k):  # type: ignore[no-untyped-def]
    """The search for k bits per weight: the loop over ways vectorizes only if their number is a constant."""
    ways = 1 << k
    low, high = np.int32(ways - 1), np.int32(-ways)

    @_compiled
    def search(x_NT, around_NL, words_S, states):  # type: ignore[no-untyped-def]  # pragma: no cover (compiled)
        sequences, length = x_NT.shape
        margin, classes = around_NL.shape[1] // 2, 1 << (states - k)
        run = classes >> k
        least_Q, best_Q = np.empty(classes, np.float32), np.empty(classes, np.int32)
        number_Q = least_Q.view(np.int32)
        cost_S = np.empty(1 << states, np.float32)
        back_TQ = np.empty((max(length, 2 * margin), classes), np.uint8)
        codes_NT = np.empty((sequences, length), np.int32)
        for n in range(sequences):
            shared = 0
            for turn in range(2):
                x_T = x_NT[n] if turn else around_NL[n]
                least_Q[:] = FAR if turn else 0
                least_Q[(shared & low) * run + (shared >> k)] = 0
                for t in range(1, len(x_T)):
                    x, back_Q = x_T[t - 1], back_TQ[t]
                    for u in range(ways):
                        word, best, back = words_S[u * classes :], best_Q[u * run :], back_Q[u * run :]
                        for j in range(run):
                            found = np.int32(0x7FFFFFFF)
                            for p in range(ways):
                                rest = x - word[p * run + j]
                                # Positive floats are in the order of their bits.
                                bits: np.int32 = _bits(least_Q[p * run + j] + rest * rest)  # type: ignore[call-arg]
                                cost = np.int32(bits & high) | np.int32(p)
                                found = cost if cost < found else found
                            best[j] = found
                            back[j] = np.uint8(found & low)
                    for j in range(run):
                        for p in range(ways):
                            number_Q[p * run + j] = best_Q[j * ways + p]
                # The states of the last weight by (p, class), so that of equals the first in that order wins.
                x = x_T[len(x_T) - 1]
                for u in range(ways):
                    for p in range(ways):
                        for j in range(run):
                            rest = x - words_S[u * classes + p * run + j]
                            cost_S[p * classes + u * run + j] = least_Q[p * run + j] + rest * rest
                end = shared if turn else np.argmin(cost_S)
                for p in range(1, ways if turn else 1):
                    if cost_S[p * classes + shared] < cost_S[end]:
                        end = p * classes + shared
                state = ((end % classes) << k) | (end // classes)
                for t in range(len(x_T) - 1, -1 if turn else margin - 1, -1):
                    if turn:
                        # The lowest bits of a state are the first that its window holds: those of its own weight.
                        codes_NT[n, t] = state & low
                    state = ((state & (classes - 1)) << k) | back_TQ[t, state & (classes - 1)]
                shared = state >> k
        return codes_NT

    return search


# By k. Each is compiled at its first call.
SEARCH = {k: _search(k) for k in (1, 2, 3, 4)}


def paths(
    x_NT: NDArray[np.float32], words_S: NDArray[np.float32], states: int, k: int, margin: int
) -> NDArray[np.int32]:
    """Codes (N, T), int32 below 2**k: for each sequence a cyclic stream whose values have nearly the least squares.

    A first turn over `margin` weights on either side of the seam chooses the bits that both ends share; with them
    given, the second turn is exact (the approximation of QTIP, section 3.2, which takes whole sequences for the first).
    """
    margin, ways = min(margin, x_NT.shape[1]), 1 << k
    around_NL = np.concatenate([x_NT[:, x_NT.shape[1] - margin :], x_NT[:, :margin]], 1)
    # From (u, j, p) to (u, p, j).
    words_S = words_S.reshape(ways, -1, ways).transpose(0, 2, 1).ravel()
    found: NDArray[np.int32] = SEARCH[k](x_NT, around_NL, words_S, states)
    return found
