"""Mixed precision: which setting each target gets, so that a budget of bits does the least measured damage.

Damage is what a stored weight does to the output of its block: with that one replaced in the dense block, the mean over
tokens of |Δ output|² / |output|². It sees what attention and gates make of an error, and how large the residual stream
is that the error meets, so it adds up across targets; tr((W−Ŵ)H(W−Ŵ)ᵀ) / tr(WHWᵀ) does neither. Shape legend: N rows,
B of them in a batch, L tokens of a row, H hidden channels, T targets, K candidates.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vqcompress.errors import UsageError
from vqcompress.methods import layout_bits
from vqcompress.model.stream import BlockStream
from vqcompress.pipeline.block import BlockEncoder, study
from vqcompress.pipeline.calibration import first_states
from vqcompress.pipeline.context import BlockContext
from vqcompress.pipeline.gather import gather
from vqcompress.pipeline.plan import Plan, Progress, make_plan
from vqcompress.pipeline.smoothing import Rewrites
from vqcompress.storage import recipe as recipes
from vqcompress.storage.artifact import stored_bits
from vqcompress.storage.recipe import Recipe
from vqcompress.storage.recipe_files import check_choice
from vqcompress.storage.writer import Writer

# The recipe whose candidates are taken where only a budget is given.
CANDIDATES = "mixed"
MEASURED_TOKENS = 2048


def choose_recipe(name: str | None, target_bits: float | None, kv_cache: str | None) -> Recipe:
    """The recipe of a name, or without one that of a budget; UsageError if recipe and budget do not fit together.

    kv_cache: a recipe whose `cache` takes the place of its own.
    """
    check_choice(name, target_bits, kv_cache)
    recipe = recipes.load(name or CANDIDATES)
    recipe = replace(recipe, cache=recipes.cache_config(kv_cache)) if kv_cache else recipe
    if recipe.candidates and target_bits is None:
        raise UsageError(f"recipe {recipe.name} lists candidates to choose from; add --target-bits, such as 2.5")
    if target_bits is not None and not recipe.candidates:
        raise UsageError(f"recipe {recipe.name} has no candidates for --target-bits to choose from; {CANDIDATES} has")
    return recipe


def make_plans(stream: BlockStream, recipe: Recipe, target_bits: float | None) -> list[Plan]:
    """The plan of a recipe; with a budget, for each candidate the plan that gives it to every target.

    UsageError if nothing is within the budget.
    """
    if target_bits is None:
        return [make_plan(stream, recipe)]
    plans = [make_plan(stream, replace(recipe, rules=(rule,))) for rule in recipe.candidates]
    least = _bits(plans).min(1).sum() / plans[0].weights
    if target_bits < least:
        raise UsageError(f"--target-bits {target_bits:g} is too little: recipe {recipe.name} needs {least:.3f} here")
    return [replace(plan, target_bits=float(target_bits)) for plan in plans]


def allocate(
    stream: BlockStream, plans: list[Plan], rows_NL: Tensor, writer: Writer, seed: int, progress: Progress
) -> Plan:
    """The plan of the least summed damage whose stored bits are within the budget, as a recipe with a rule per target.

    plans: of `make_plans`. Blocks that the writer has measurements of are not measured again.
    """
    recipe, targets, target_bits = plans[0].recipe, plans[0].targets, plans[0].target_bits
    assert target_bits is not None
    if any(block.name not in writer.measured for block in plans[0].blocks):
        _measure(stream, plans, rows_NL, writer, seed, progress)
    damage = {name: row for block in writer.measured.values() for name, row in block.items()}
    budget = target_bits * plans[0].weights
    picks = choose(_bits(plans), np.array([damage[target.name] for target in targets]), budget)
    rules = tuple(replace(recipe.candidates[k], match=t.name) for t, k in zip(targets, picks, strict=True))
    description = f"{recipe.name} at --target-bits {target_bits:g}: the setting that was chosen for each weight"
    plan = make_plan(stream, replace(recipe, description=description, rules=rules, candidates=()))
    assert sum(stored_bits(plan.entries).values()) <= budget
    return replace(plan, target_bits=target_bits)


def choose(bits_TK: np.ndarray, error_TK: np.ndarray, budget: float) -> list[int]:
    """For every target the number of a candidate, so that the sum of errors is small and the bits are within budget.

    Lagrangian relaxation of the multiple-choice knapsack (Sinha and Zoltners 1979): from the cheapest, steps along the
    convex hull of each target's errors over bits, the steepest first, ties in the order of targets. From every stop
    one exchange uses what is left. Stops and exchanges do not depend on the budget, so a larger one is never worse.
    """
    all_T = np.arange(len(bits_TK))
    picks_T = np.lexsort((error_TK, bits_TK))[:, 0]
    steps = [(-np.inf, 0, 0.0, picks_T[0])]
    for t, (bits_K, error_K) in enumerate(zip(bits_TK, error_TK, strict=True)):
        at = picks_T[t]
        while better := [
            ((error_K[k] - error_K[at]) / (bits_K[k] - bits_K[at]), t, bits_K[k], k)
            for k in np.flatnonzero((bits_K > bits_K[at]) & (error_K < error_K[at]))
        ]:
            steps.append(min(better))
            at = steps[-1][-1]
    least, found_T = np.inf, picks_T
    for _, t, _, k in sorted(steps):
        picks_T[t] = k
        more_TK = bits_TK - bits_TK[all_T, picks_T][:, None]
        left = budget - bits_TK[all_T, picks_T].sum()
        if left < 0:
            break
        gain_TK = np.where(more_TK <= left, error_TK - error_TK[all_T, picks_T][:, None], np.inf)
        exchanged, to = np.unravel_index(gain_TK.argmin(), gain_TK.shape)
        if (total := error_TK[all_T, picks_T].sum() + gain_TK[exchanged, to]) < least:
            least, found_T = total, picks_T.copy()
            found_T[exchanged] = to
    return [int(k) for k in found_T]


def _bits(plans: list[Plan]) -> np.ndarray:
    """Bits (T, K), as if each target paid alone for shared parts: how many others will choose the same is unknown."""
    each = [[layout_bits(e.layout()) + layout_bits(e.method.shared_layout()) for e in plan.entries] for plan in plans]
    return np.array(each, dtype=np.float64).T


def _measure(
    stream: BlockStream, plans: list[Plan], rows_NL: Tensor, writer: Writer, seed: int, progress: Progress
) -> None:
    """Save the damage of every candidate to every target, block by block, in one pass of the dense model."""
    few = max(1, MEASURED_TOKENS // rows_NL.shape[1])
    # Also learns how blocks are called with these rows alone.
    stream.embed(rows_NL[:few])
    states = first_states(stream, rows_NL)
    for i, block in enumerate(plans[0].blocks):
        progress("measure", {"index": i, "count": len(plans[0].blocks), "name": block.name})
        if block.name not in writer.measured:
            damage = _measure_block(BlockContext(stream, plans[0], i, states, seed), plans, few)
            writer.save_measured(block.name, damage)
        stream.forward(stream.load_block(i), i, states)


def _measure_block(context: BlockContext, plans: list[Plan], rows: int) -> dict[str, list[float]]:
    """For each target of a block the damage of every candidate. rows: their number to measure with."""
    stream, block, probe = context.stream, context.block, context.probe(rows, None)
    tensors, module, inputs, statistics = study(context)
    gathered = {plans[0].methods[0].needs: statistics}
    clean_BLH = context.run(module, probe).float()
    damage: dict[str, list[float]] = {target.name: [] for target in plans[0].compressed(block)}
    for plan in plans:
        candidate, needs, encoded = replace(context, plan=plan), plan.methods[0].needs, dict(tensors)
        if needs not in gathered:
            gathered[needs] = gather(candidate, module, inputs)
        facts = BlockEncoder(candidate, encoded, gathered[needs], Rewrites()).encode()["targets"]
        if not stream.runs(context.index):
            # Text skips this block, so its output shows nothing: the error of the weight itself counts.
            for target, row in zip(plan.compressed(block), facts, strict=True):
                damage[target.name].append(row["relative_error"])
            continue
        stored = stream.load_block(context.index, encoded, plan.entries_of(block))
        for target in plan.compressed(block):
            path = block.local(target)
            original = module.get_submodule(path)
            module.set_submodule(path, stored.get_submodule(path))
            changed_BLH = context.run(module, probe).float() - clean_BLH
            module.set_submodule(path, original)
            share_BL = changed_BLH.square().sum(-1) / clean_BLH.square().sum(-1).clamp(min=1e-30)
            damage[target.name].append(share_BL.mean(dtype=torch.float64).item())
    return damage
