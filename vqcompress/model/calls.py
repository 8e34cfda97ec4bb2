"""How a model calls its blocks, learned by running its own `forward` with a recorder in place of every block.

Most models are *plain*: every block gets the hidden states and arguments that depend on the shape of a batch alone, so
these are recorded once per shape. In others blocks also get tensors of their own row (embeddings per layer, token ids),
more of what the block before answered, or a mapping that earlier blocks filled. Their forward is run again for each
call of a block, up to that call: the block before answers what it did, all blocks before that answer NaN, so that
nothing of them can be read unnoticed.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, MutableMapping
from dataclasses import replace
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only

from vqcompress.errors import VQCompressError, one_line
from vqcompress.storage.hidden_states import State

Call = tuple[tuple[Any, ...], dict[str, Any]]
# Tokens of the rows by which calls are learned, and the most items that a block may answer.
TOKENS, ITEMS = 8, 4


class _Reached(Exception):
    """Ends a forward pass at a block."""


class _Hidden(Tensor):
    """Hidden states as the output of a block: indexed with 0 they are themselves, as if a tuple held them.

    Some models take the first item of their blocks' outputs, others the outputs as they are.
    """

    # Results of operations are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, key: Any) -> Tensor:
        return self if isinstance(key, int) and key == 0 else super().__getitem__(key)


class Dropped:
    """Stands for an item of a block's output that the next block does not read, so that it was not kept."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"an item of a block's output that the next block does not read has no {name!r} here")


class _Recorder(nn.Module):
    """Stands for a block: hands its calls on to `calls`, and answers what that says."""

    def __init__(self, block: nn.Module, index: int, calls: Calls):
        super().__init__()
        # Not as submodules: the model's state then names no tensor of a block that is not in memory.
        self.block, self.index = (block,), index
        # In a circle with the model, its memory would stay until a garbage collection.
        self.calls = weakref.proxy(calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block is said to answer."""
        return self.calls.answer(self.index, (args, kwargs))


class Calls:
    """The calls of the blocks in a model's forward; recorders replace the blocks in `layers`.

    order: number of the block of each call. plain: see the top of the file. refusal: why the model cannot be run block
    by block, or "". All but the first are known once `learn` has run; the model's other weights must be there by then.
    """

    def __init__(self, model: Any, layers: nn.ModuleList, device: torch.device):
        self.model, self.device = model, device
        self.order: list[int] = []
        self.plain, self.refusal = True, ""
        self._learned = False
        self._items = 1
        # Number of a call → which items of its output the next call reads, beside the hidden states.
        self._read: dict[int, set[int]] = {}
        self._fixed: dict[torch.Size, list[Call]] = {}
        # Of the pass that runs: the number of the call that ends it, the answer of the one before, the calls so far.
        self._end, self._answer, self._seen = -1, None, list[tuple[int, Call]]()
        self._recorders = [_Recorder(block, i, self) for i, block in enumerate(layers)]
        for i, recorder in enumerate(self._recorders):
            layers[i] = recorder

    def answer(self, index: int, call: Call) -> Any:
        """What a block answers in the pass that runs; the call that the pass was started for ends it."""
        number = len(self._seen)
        self._seen.append((index, call))
        if number == self._end:
            raise _Reached
        if self._answer is not None and number == self._end - 1:
            return self._answer
        hidden = hidden_of(call)
        if self._answer is not None and number == 0:
            hidden = torch.full_like(hidden, torch.nan)
        return self._wrap(hidden, None if self._answer is None else Dropped())

    def _wrap(self, hidden: Tensor, rest: Any) -> Any:
        if self._items < 2:
            return hidden.as_subclass(_Hidden) if self._items else hidden
        return hidden, *[rest] * (self._items - 1)

    def _pass(self, ids_BL: Tensor, end: int = -1, answer: Any = None) -> Any:
        """Run the forward, to the call with the number `end` if there is one; its output if it was not ended."""
        self._end, self._answer, self._seen = end, answer, []
        with contextlib.suppress(_Reached):
            return self.model(ids_BL.to(self.device), use_cache=False)

    @torch.inference_mode()
    def learn(self) -> Calls:
        """Find out, once, in which order blocks are called and with what."""
        if not self._learned:
            vocabulary = self.model.get_input_embeddings().weight.shape[0]
            ids_BL = (vocabulary // 2 + torch.arange(TOKENS)[None]) % vocabulary
            versions = self._versions()
            self.refusal = self._learn_order(ids_BL)
            if not self.refusal and versions != self._versions():
                self.refusal = f"{type(self.model).__name__} changes weights of its blocks when it runs"
            self._learned = True
        return self

    def _versions(self) -> list[int]:
        """Numbers that grow when a weight of a block is changed in place."""
        weights = (p for recorder in self._recorders for p in recorder.block[0].parameters())
        return [p._version for p in weights if not p.is_inference()]

    def _learn_order(self, ids_BL: Tensor) -> str:
        """Set `order`, `plain` and the number of items that a block answers; returns why this fails, or ""."""
        name, errors = type(self.model).__name__, []
        for items in range(ITEMS + 1):
            # Models take what their blocks answer as it is, or the first of its items, or unpack them: tried out.
            self._items = items
            try:
                shape = self._pass(ids_BL).logits.shape
                shapes = {hidden_of(call).shape for _, call in self._seen}
                if shape[:2] == ids_BL.shape and len(shapes) == 1:
                    break
                errors.append(f"hidden states of {len(shapes)} shapes")
            except Exception as error:  # as many types as there are models
                errors.append(one_line(error))
        if len(errors) > ITEMS:
            return f"{name} does not run without its blocks: {errors[0]}"
        first, self.order = self._seen, [index for index, _ in self._seen]
        if self.order != sorted(set(self.order)) or not self.order:
            return f"{name} calls its blocks in the order {_shortened(self.order)}"
        self._pass(ids_BL.flip(1))
        self.plain = self._items < 2 and _is_plain(first, ids_BL) and _same(_arguments(first), _arguments(self._seen))
        answer = self._wrap(torch.ones_like(hidden_of(first[0][1])), None)
        # Of a plain model only the head can read more.
        for number in range(len(first) if self.plain else 1, len(first) + 1):
            where = f"block {self.order[number]}" if number < len(first) else "the head"
            try:
                found = self._pass(ids_BL, number, answer)
            except Exception as error:
                return f"{where} of {name} reads what earlier blocks answer: {one_line(error)}"
            if _has_nan(self._seen[-1] if found is None else found.logits):
                return f"{where} of {name} reads what earlier blocks put out, not the last one alone"
        return ""

    def number(self, block: int) -> int | None:
        """The number of the call of a block; None if text alone skips it. `learn` must have run."""
        assert self._learned
        return self.order.index(block) if block in self.order else None

    def require(self) -> None:
        """VQCompressError if the model cannot be run block by block."""
        if self.learn().refusal:
            raise VQCompressError(
                f"{self.refusal}, so it cannot be run block by block; take a recipe without calibration, as fp8-tile"
            )

    def embed(self, ids_BL: Tensor) -> State:
        """The state before the first block. Of a plain model the calls for this shape are recorded."""
        self.require()
        self._pass(ids_BL, len(self.order) - 1 if self.plain else 0)
        state = State(hidden_of(self._seen[0][1]), ids_BL)
        if self.plain:
            # Tokens of a special meaning can change arguments that others leave alone.
            calls = _arguments(self._seen)
            self.plain = _same(self._fixed.setdefault(ids_BL.shape, calls), calls)
        return state

    def step(self, block: nn.Module, number: int, state: State) -> State:
        """The state after a block that is called with this number."""
        if self.plain:
            args, kwargs = self._fixed[state.ids.shape][number]
            out = block(state.hidden, *args, **kwargs)
            return State(out[0] if isinstance(out, (tuple, list)) else out, state.ids)
        args, kwargs = self._replay(number, state)
        shared = _mappings((args, kwargs))
        for name, contents in state.shared.items():
            # The block may write into them, and run again on this state.
            shared[name].update(tree_map_only(Tensor, torch.clone, contents))
        before = {name: _contents(mapping) for name, mapping in shared.items()}
        out = block(*args, **kwargs)
        hidden, *rest = out if isinstance(out, (tuple, list)) else (out,)
        filled = {
            name: dict(mapping)
            for name, mapping in shared.items()
            if name in state.shared or not _unchanged(before[name], mapping)
        }
        return State(hidden, state.ids, tuple(rest), filled, isinstance(out, (tuple, list)))

    def kept(self, number: int, state: State) -> State:
        """The state after a call without those items of the block's output that the next block does not read."""
        if not state.rest:
            return state
        if number not in self._read:
            leaves = []
            if number + 1 < len(self.order):
                leaves = [id(x) for x in tree_leaves(self._replay(number + 1, state)) if isinstance(x, Tensor)]
            wanted = {k for k, item in enumerate(state.rest) if any(id(x) in leaves for x in tree_leaves(item))}
            self._read[number] = wanted
        wanted = self._read[number]
        rest = (x if x is None or k in wanted else Dropped() for k, x in enumerate(state.rest))
        return replace(state, rest=tuple(rest))

    def logits(self, state: State) -> Tensor:
        """The logits (B, L, V) that follow from the state after the last block."""
        answer = self._wrap(state.hidden, None) if self.plain else _output(state)
        found: Tensor = self._pass(state.ids, len(self.order), answer).logits
        return found

    def _replay(self, number: int, state: State) -> Call:
        """The call with a number, hidden states included, that follows from the state before it."""
        self._pass(state.ids, number, _output(state) if number else None)
        return self._seen.pop()[1]


def _output(state: State) -> Any:
    """What the last block answered."""
    return (state.hidden, *state.rest) if state.is_tuple else state.hidden


def hidden_of(call: Call) -> Tensor:
    """The hidden states among the arguments of a call: the first one, or the one of that name."""
    args, kwargs = call
    return args[0] if args else kwargs["hidden_states"]


def _arguments(seen: list[tuple[int, Call]]) -> list[Call]:
    """The other arguments of all calls."""
    calls = [call for _, call in seen]
    return [(args[1:], {k: x for k, x in kwargs.items() if args or k != "hidden_states"}) for args, kwargs in calls]


def _mappings(call: Call) -> dict[str, MutableMapping[Any, Any]]:
    """The mappings among the arguments of a call, by name or position."""
    args, kwargs = call
    found = {str(name): value for name, value in (*enumerate(args), *kwargs.items())}
    return {name: value for name, value in found.items() if isinstance(value, MutableMapping)}


def _contents(mapping: MutableMapping[Any, Any]) -> tuple[TreeSpec, list[Any], list[Any]]:
    """The containers in a mapping, what they hold, and the same with copies of tensors: a block may write into them."""
    leaves, containers = tree_flatten(dict(mapping))
    return containers, leaves, tree_map_only(Tensor, torch.clone, leaves)


def _unchanged(before: tuple[TreeSpec, list[Any], list[Any]], mapping: MutableMapping[Any, Any]) -> bool:
    """Whether a mapping holds the same objects, with the same values, as `_contents` saw."""
    leaves, containers = tree_flatten(dict(mapping))
    return containers == before[0] and all(map(is_, leaves, before[1])) and _same(leaves, before[2])


def _is_plain(seen: list[tuple[int, Call]], ids_BL: Tensor) -> bool:
    """Whether hidden states (B, L, H) go from block to block as they are, and no mapping goes beside them."""
    calls = [call for _, call in seen]
    first = hidden_of(calls[0])
    passed = all(hidden_of(call).data_ptr() == first.data_ptr() for call in calls)
    return passed and first.shape[:-1] == ids_BL.shape and not any(_mappings(call) for call in calls)


def _same(earlier: list[Any], later: list[Any]) -> bool:
    """Whether all tensors in two lists, as of the arguments of two passes, are equal."""
    pairs = zip(tree_leaves(earlier), tree_leaves(later), strict=False)
    return all(torch.equal(x, y) for x, y in pairs if isinstance(x, Tensor))


def _has_nan(found: Any) -> bool:
    tensors = (x for x in tree_leaves(found) if isinstance(x, Tensor) and x.is_floating_point())
    return any(bool(x.isnan().any()) for x in tensors)


def _shortened(order: Iterable[int]) -> str:
    """At most twelve numbers of blocks."""
    numbers = [str(index) for index in order]
    return ", ".join(numbers[:12]) + (", …" if len(numbers) > 12 else "")
