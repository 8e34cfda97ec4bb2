"""Output correction: the last layer of a block corrects the errors of all weights before it.

Beside the hidden states of the stored model run those of the dense model (the reference). Once the other weights of a
block are stored, its last linear layer, which adds its output to the block's, is moved by least squares before it is
quantized: with D = reference − output so far and x its input, W + (Σ D xᵀ)(Σ x xᵀ + λ)⁻¹. This costs no bit and keeps
errors from adding up over the blocks. (The asymmetric calibration of GPTAQ, arXiv 2504.02692, section 4, fits each
layer to its own dense output; fitting the last one to the block's, residual stream included, measured better:
docs/vq.md.)
Shape legend: O output rows, I input channels, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqcompress.methods.statistics import Accumulator, Statistics
from vqcompress.model.folds import Input
from vqcompress.pipeline.context import BlockContext
from vqcompress.storage.distributed import reduce_statistics

TOLERANCE = 0.02


@torch.no_grad()
def closing_layer(context: BlockContext, module: nn.Module, inputs: list[Input]) -> str | None:
    """The path of the linear layer that is read last and adds its output to the block's; None if that is not so.

    Proven by running: another weight must change the block's output by exactly what it makes of the layer's input.
    """
    probe = context.probe()
    alone = [entrance.consumers[0] for entrance in inputs if len(entrance.consumers) == 1 and entrance.mixture is None]
    layer = module.get_submodule(alone[-1]) if alone else None
    if not isinstance(layer, nn.Linear) or layer.out_features != probe.hidden.shape[-1]:
        return None
    seen: list[Tensor] = []
    weight = layer.weight.data
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight) * weight.std()
    with layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        before = context.run(module, probe)
        layer.weight.data = weight + change
        after = context.run(module, probe)
        layer.weight.data = weight
    expected = (seen[0] @ change.T).float()
    if expected.numel() != after.numel():
        return None
    gap = (after.float() - before.float() - expected.view_as(after)).norm()
    # Two outputs that were rounded to a short type differ by that much.
    rounding = torch.finfo(after.dtype).eps * after.float().norm()
    return alone[-1] if gap <= TOLERANCE * expected.norm() + rounding else None


@torch.no_grad()
def corrected(
    context: BlockContext, module: nn.Module, path: str, weight_OI: Tensor, needs: frozenset[str], seed: int | None
) -> tuple[Tensor, Statistics]:
    """The weight of the closing layer that brings the block's output nearest to the dense one's; its statistics.

    The reference of the context is the output of the dense block. module: the block, all but the closing layer as
    stored. path: of the closing layer. seed: of its statistics.
    """
    stream, (tokens, before) = context.stream, context.count_tokens()
    seen = Accumulator(needs | {"hessian"}, weight_OI.shape[1], tokens, stream.device, before)
    # In float64, as in an accumulator.
    missing_OI = torch.zeros_like(weight_OI, dtype=torch.float64)
    entering: list[Tensor] = []
    with module.get_submodule(path).register_forward_pre_hook(lambda _, args: entering.append(args[0])):
        for state, dense in zip(context.states, context.reference, strict=True):
            gap_TO = (dense.hidden.float() - context.run(module, state).float()).flatten(0, -2)
            x = entering.pop()
            seen.add(x)
            missing_OI += gap_TO.T @ x.reshape(len(gap_TO), -1).float()
    reduce_statistics(stream.group, seen)
    stream.group.all_reduce(missing_OI)
    known = seen.statistics(seed)
    # Free its sums: they are as large as what follows.
    del seen
    assert known.hessian_II is not None
    hessian_II = known.hessian_II.double()
    # Damping in proportion to channels / tokens, so that a few tokens are not overfitted.
    damping = max(1e-3, len(hessian_II) / tokens) * hessian_II.diagonal().mean().clamp(min=1e-30)
    hessian_II.diagonal().add_(damping)
    move_OI = torch.linalg.solve(hessian_II, missing_OI.double().T / tokens).T
    return (weight_OI.double() + move_OI).float(), known
