"""The last layer of a block makes good what all errors before it did to the hidden states.

Beside the hidden states that the stored model makes runs a second stream of those that the dense model makes. Once
the other weights of a block are stored, its last linear layer, which adds its output to the block's, is moved to the
least squares of what is missing: with D = dense output − output so far and x its input, W + (Σ D xᵀ)(Σ x xᵀ + λ)⁻¹,
and then quantized. So errors are made up for where that costs no bit, instead of adding up from block to block (the
asymmetric calibration of GPTAQ, arXiv 2504.02692, section 4, asks each layer for its own dense output; asking the last
one for the block's, residual stream included, measured better: docs/vq.md).
Shape legend: O output rows, I input channels, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqcompress.methods.statistics import Accumulator, Statistics
from vqcompress.model.folds import Input
from vqcompress.model.stream import BlockStream
from vqcompress.storage.distributed import reduce_statistics
from vqcompress.storage.hidden_states import States

TOLERANCE = 0.02


@torch.no_grad()
def closing_layer(stream: BlockStream, index: int, module: nn.Module, inputs: list[Input], probe: Tensor) -> str | None:
    """The path of the linear layer that is read last and adds its output to the block's; None if that is not so.

    Proven by running: another weight must change the block's output by exactly what it makes of the layer's input.
    """
    alone = [entrance.consumers[0] for entrance in inputs if len(entrance.consumers) == 1 and entrance.mixture is None]
    layer = module.get_submodule(alone[-1]) if alone else None
    if not isinstance(layer, nn.Linear) or layer.out_features != probe.shape[-1]:
        return None
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    weight = layer.weight.data
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight) * weight.std()
    try:
        before = stream.run(module, index, probe)
        layer.weight.data = weight + change
        after = stream.run(module, index, probe)
    finally:
        layer.weight.data = weight
        handle.remove()
    expected = (seen[0] @ change.T).float()
    gap = (after.float() - before.float() - expected.view_as(after)).norm()
    # Two outputs that were rounded to a short type differ by that much.
    rounding = torch.finfo(after.dtype).eps * after.float().norm()
    return alone[-1] if gap <= TOLERANCE * expected.norm() + rounding else None


@dataclass(frozen=True)
class Compensation:
    """What it takes to make good the drift of a block. path: of its closing layer inside the block.

    states: the hidden states that enter the stored block, by batch. truth: those that the dense model's block puts out.
    """

    stream: BlockStream
    index: int
    path: str
    states: States
    truth: States

    def __call__(
        self, module: nn.Module, weight_OI: Tensor, needs: frozenset[str], facts: Statistics
    ) -> tuple[Tensor, Statistics]:
        """The weight that is to be quantized in place of the closing layer's, and the statistics of its input.

        module: the block, all but the closing layer as stored. facts: what was known of the input.
        """
        layer, group = module.get_submodule(self.path), self.stream.group
        counts = group.all_gather(sum(t.shape[0] * t.shape[1] for t in self.states))
        tokens, before = sum(counts), sum(counts[: group.rank])
        seen = Accumulator(needs | {"hessian"}, weight_OI.shape[1], tokens, self.stream.device, before)
        # In float64, as in an accumulator.
        missing_OI = torch.zeros_like(weight_OI, dtype=torch.float64)
        entering: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
        try:
            for state, truth in zip(self.states, self.truth, strict=True):
                gap_TO = (truth.float() - self.stream.run(module, self.index, state).float()).flatten(0, -2)
                x = entering.pop()
                seen.add(x)
                missing_OI += gap_TO.T @ x.reshape(len(gap_TO), -1).float()
        finally:
            handle.remove()
        reduce_statistics(group, seen)
        group.all_reduce(missing_OI)
        known = seen.statistics(facts.seed)
        # Its sums are as large as all that follows.
        del seen
        assert known.hessian_II is not None
        hessian_II = known.hessian_II.double()
        # As much damping as the noise of so many tokens is worth, so that few of them are not learned by heart.
        damping = max(1e-3, len(hessian_II) / tokens) * hessian_II.diagonal().mean().clamp(min=1e-30)
        hessian_II.diagonal().add_(damping)
        move_OI = torch.linalg.solve(hessian_II, missing_OI.double().T / tokens).T
        return (weight_OI.double() + move_OI).float(), known
