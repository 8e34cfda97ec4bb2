"""Try every type of language model that the installed transformers knows, on a toy of each.

Usage: python scripts/sweep.py [--only NAME ...] [--recipe NAME ...] [--work DIR] [--processes N] [--again] [--keep]

For each type: `doctor`; `fp8-tile`, `smoothquant-int8` and `vq-2bit`; `verify`; `eval` against a plain loop over
`from_pretrained`; `load` against `from_pretrained`; the dense export against both; weights and logits against the
toy's. A result is a JSON file in --work. What has one of the same code is not run again, so that a sweep can be stopped
and continued. The table is docs/architectures.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import toy_zoo
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from vqcompress.errors import VQCompressError
from vqcompress.evaluate.doctor import examine
from vqcompress.evaluate.perplexity import perplexity
from vqcompress.evaluate.verify import verify
from vqcompress.export import export
from vqcompress.model.linear import CompressedLinear, decode_layers
from vqcompress.pipeline.options import QuantizeOptions
from vqcompress.pipeline.quantize import quantize
from vqcompress.runtime.load import load

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "architectures.md"
RECIPES = ("fp8-tile", "smoothquant-int8", "vq-2bit")
WORKS, PARTLY, REFUSED, FAILED = "works", "works without calibration alone", "refused", "FAILED"
BROKEN = "transformers itself fails, or takes no text alone"
# Tokens of a row and rows of the evaluation; samples of the calibration.
SEQLEN, WINDOWS, SAMPLES = 48, 2, 4
# Largest difference of logits, relative to the largest logit, of two ways to run the same weights in float32.
TOLERANCE = 2e-4
# Largest change of a compressed weight, relative to it, as root mean squares: more is no rounding of this weight. Of
# INT8, beside factors of its rows and columns, as smoothing puts them there.
FAR = {"fp8-tile": 0.05, "smoothquant-int8": 0.05, "vq-2bit": 0.9}
# How much farther than noise of the same size in the same weights a recipe may move the logits of a typical token.
TIMES = 3.0
# What torch says where it lost its threads.
LOST = "Invalid thread pool"
# Limits of a type: seconds of the processor, seconds of the clock, bytes of memory.
SECONDS, WALL, BYTES = 600, 2400, 8 * 2**30


class Failure(Exception):
    """A comparison that does not hold."""


class BrokenByTransformers(Exception):
    """A toy that transformers cannot make, save, load or run on text, or that differs from itself after loading."""


def plain(folder: Path) -> Any:
    """The model of a directory by `from_pretrained` of the class that its config names."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def logits_of(model: Any, ids_BL: Tensor) -> Tensor:
    """Logits (B, L, V) of a model on rows of tokens."""
    return model(input_ids=ids_BL, use_cache=False).logits.float()


def check_same(what: str, a: Tensor, b: Tensor) -> None:
    """Failure unless two tensors of logits agree within the tolerance."""
    if a.shape != b.shape:
        raise Failure(f"{what}: logits of {tuple(a.shape)} and {tuple(b.shape)}")
    difference = ((a - b).abs().max() / b.abs().max()).item()
    if not difference <= TOLERANCE:
        raise Failure(f"{what}: logits differ by {difference:.1e} of the largest")


def rows(folder: Path = toy_zoo.DEMO) -> Tensor:
    """The first rows of the demo's evaluation text, (WINDOWS, SEQLEN), by the tokenizer of a directory.

    Which class reads the same tokenizer.json depends on the type of the model.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = (toy_zoo.DEMO / "evaluation.txt").read_text(encoding="utf-8")[:4000]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    return ids[: WINDOWS * SEQLEN].view(WINDOWS, SEQLEN)


def make_toy(name: str, folder: Path) -> None:
    """Save a toy. BrokenByTransformers if transformers cannot run it on text alone, or loads another model."""
    step = "cannot be made"
    try:
        model, ids = toy_zoo.toy_model(name), rows()
        step = "does not run on text alone"
        before = logits_of(model, ids)
        if before.shape[:2] != ids.shape or not torch.equal(before, logits_of(model, ids)):
            raise Failure("its logits are of other tokens than the text's, or random")
        step = "cannot be saved and loaded"
        toy_zoo.save(model, folder)
        after = logits_of(plain(folder), ids)
        if not after.isfinite().all():
            raise Failure("its logits are not finite")
        check_same("before and after", after, before)
    except Exception as error:
        kind = "" if isinstance(error, Failure) else f"{type(error).__name__}: "
        raise BrokenByTransformers(f"{step}: {kind}{error}") from error


def check_evaluation(folder: Path, text: Path, model: Any) -> None:
    """Failure unless `eval perplexity` is that of a plain loop over a model."""
    ids = rows(folder)
    logits = logits_of(model, ids)
    found = perplexity(str(folder), str(text), device="cpu", seqlen=SEQLEN, limit=WINDOWS)
    plain_nll = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    if not abs(found["nll_per_token"] - plain_nll) <= TOLERANCE * max(1, abs(plain_nll)):
        raise Failure(f"eval: {found['nll_per_token']:.5f} per token, a plain loop {plain_nll:.5f}")


def check_artifact(artifact: Path, toy: Path, report: dict[str, Any], text: Path) -> tuple[float, float]:
    """Every comparison of an artifact; returns what `check_change` does."""
    verify(str(artifact))
    ids = rows()
    model = plain(artifact)
    own = logits_of(model, ids)
    check_same("load and from_pretrained", logits_of(load(artifact, "cpu"), ids), own)
    check_evaluation(artifact, text, model)
    exported = artifact.with_name(artifact.name + "-dense")
    export(str(artifact), "dense", exported)
    packed = [path for path, layer in model.named_modules() if isinstance(layer, CompressedLinear)]
    decode_layers(model)
    for path in packed:
        # As the export rounds it.
        weight = model.get_submodule(path).weight
        weight.data = weight.data.to(torch.bfloat16).float()
    check_same("the dense export and the artifact", logits_of(plain(exported), ids), logits_of(model, ids))
    found = check_change(toy, exported, report, own, ids)
    shutil.rmtree(exported)
    return found


def check_change(toy: Path, exported: Path, report: dict[str, Any], own: Tensor, ids: Tensor) -> tuple[float, float]:
    """Failure unless the weights of a dense export are those of the toy, rounded, and the logits follow from that.

    Returns how far the recipe moves the logits, and how far noise does that changes each weight of the toy as much:
    that bounds the former. A number would not, as random mixtures choose other experts after the least change.
    """
    recipe, before, after = report["recipe"], tensors_of(toy), tensors_of(exported)
    scaled = recipe == "smoothquant-int8"
    if before.keys() != after.keys():
        raise Failure(f"the dense export has other tensors than the toy: {sorted(before.keys() ^ after.keys())[:4]}")
    differ = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    changes = {n: rounding(before[n].float(), after[n].float(), scaled) for n in differ if before[n].dim() > 1}
    # Layers that were moved to correct their block's output. A report has the model's names, a file its own.
    moved = {_place(row["name"] + ".weight") for row in report["targets"] if row["compensates"]}
    rounded = {name: x for name, x in changes.items() if _place(name) not in moved}
    for name in differ:
        if not (rounded.get(name, 0) <= FAR[recipe] if name in changes else scaled):
            raise Failure(f"{recipe} changes {name} by {changes.get(name, math.nan):.2g} of it")
    generator = torch.Generator().manual_seed(0)
    for name in changes:
        noise = torch.randn(before[name].shape, generator=generator)
        change = rounded.get(name, statistics.median(rounded.values()))
        before[name] = (before[name] * (1 + change * noise)).to(before[name].dtype)
    dense, control = logits_of(plain(toy), ids), toy.with_name("control")
    shutil.copytree(toy, control, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    save_file(before, control / "model.safetensors", {"format": "pt"})
    found, usual = distance(own, dense), distance(logits_of(plain(control), ids), dense)
    if not found <= TIMES * usual:
        raise Failure(
            f"{recipe} moves the logits by {found:.2g} of their size, and noise in the weights by {usual:.2g}"
        )
    return found, usual


def _place(name: str) -> tuple[str, str]:
    """The number of a weight's block, and the end of its name: what the model and its files spell alike."""
    return re.sub(r"^\D*(\d*).*", r"\1", name), ".".join(name.split(".")[-3:])


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def distance(after: Tensor, before: Tensor) -> float:
    """Change of the logits of the typical token, relative to them."""
    return ((after - before).norm(dim=-1) / before.norm(dim=-1)).median().item()


def rounding(before: Tensor, after: Tensor, scaled: bool) -> float:
    """Change of a weight (..., O, I), relative to it; of a scaled one, beside the best factors of rows and columns."""
    expected = before
    for dim in (-1, -2) * 4 if scaled else ():
        square = expected.square().sum(dim, keepdim=True)
        expected = expected * ((after * expected).sum(dim, keepdim=True) / square.clamp(min=1e-30))
    return ((after - expected).norm() / expected.norm()).item()


def diagnosis(toy: Path) -> tuple[str, dict[str, Any]]:
    """Why `doctor` refuses a toy, or "", and some of what it says."""
    try:
        facts = examine(str(toy))
    except VQCompressError as error:
        return str(error), {}
    # Recipes without calibration need no run block by block.
    failed = [check for check in facts["checks"] if not check["ok"] and "calibration" not in check["name"]]
    refusal = "; ".join(check["detail"] for check in failed)
    return refusal, {key: facts[key] for key in ("coverage", "left_dense", "checks")}


def try_recipes(result: dict[str, Any], folder: Path) -> None:
    """Quantize the toy of a folder by each recipe, and compare; notes in the result what is refused."""
    text = folder / "text.txt"
    text.write_text((toy_zoo.DEMO / "evaluation.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    for recipe in result["recipes"]:
        result["step"] = f"quantize {recipe}"
        job = QuantizeOptions(str(folder / "toy"), folder / recipe, recipe, [str(text)], SAMPLES, SEQLEN, device="cpu")
        try:
            report = quantize(job)
        except VQCompressError as error:
            result["refused"][recipe] = plain_line(error, folder)
            continue
        result["targets"] = [target["name"] for target in report["targets"]]
        result["step"] = f"artifact {recipe}"
        result["moved"][recipe] = check_artifact(folder / recipe, folder / "toy", report, text)
        shutil.rmtree(folder / recipe)


def plain_line(error: BaseException, folder: Path) -> str:
    """What an error says, without the path of a temporary folder."""
    return (" ".join(str(error).split()) or type(error).__name__).replace(str(folder), "")


def try_type(name: str, folder: Path, recipes: list[str]) -> dict[str, Any]:
    """The result of a type: its state, the reason, and the last lines of a traceback. Works in an empty folder."""
    result: dict[str, Any] = {"name": name, "class": toy_zoo.class_name(name), "step": "toy", "recipes": recipes}
    result |= {"refused": {}, "moved": {}, "reason": ""}
    try:
        make_toy(name, folder / "toy")
        result["step"] = "doctor"
        refusal, facts = diagnosis(folder / "toy")
        result |= facts
        try_recipes(result, folder)
        if refused := result["refused"]:
            reason = "; ".join(dict.fromkeys(refused.values()))
            return {**result, "state": PARTLY if len(refused) < len(recipes) else REFUSED, "reason": reason}
        if refusal:
            result["step"] = "doctor"
            raise Failure(f"doctor refuses what works: {refusal}")
        return {**result, "state": WORKS}
    except BaseException as error:
        state = BROKEN if isinstance(error, BrokenByTransformers) else FAILED
        tail = [line for line in traceback.format_exc().splitlines() if "^^^" not in line and "~~~" not in line][-24:]
        reason = plain_line(error, folder)
        if state == FAILED and not isinstance(error, (Failure, VQCompressError)):
            reason = f"internal error: {type(error).__name__}: {reason}"
        return {**result, "state": state, "reason": reason, "traceback": tail}


def child(name: str, work: Path, recipes: list[str], code: str) -> None:
    """Run a type in this process and write its result. code: what `fingerprint` says."""
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    with tempfile.TemporaryDirectory(dir=work) as folder:
        result = try_type(name, Path(folder), recipes)
    result |= {"seconds": round(time.process_time(), 1), "code": code}
    (work / f"{name}.json.new").write_text(json.dumps(result, indent=1))
    (work / f"{name}.json.new").replace(work / f"{name}.json")


def fingerprint() -> str:
    """Of the code that makes results: a result of other code is stale."""
    files = sorted({*(ROOT / "vqcompress").rglob("*.py"), *(ROOT / "configs").iterdir(), *ROOT.glob("scripts/*zoo.py")})
    contents = [file.read_bytes() for file in [*files, Path(__file__)]]
    return hashlib.sha256(b"\0".join([transformers.__version__.encode(), *contents])).hexdigest()[:12]


def run_all(names: list[str], work: Path, processes: int, recipes: list[str], code: str) -> None:
    """Run types in processes forked from this one, which has run one and so imported everything."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        try_type("llama", Path(folder), recipes)
    context = multiprocessing.get_context("fork")
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < processes:
            name = waiting.pop(0)
            process = context.Process(target=child, args=(name, work, recipes, code))
            process.start()
            running[process.sentinel] = (name, process, time.monotonic() + WALL)
        ended = wait(list(running), timeout=1)
        for sentinel, (name, process, deadline) in list(running.items()):
            late = time.monotonic() > deadline
            if sentinel not in ended and not late:
                continue
            if late:
                process.kill()
            process.join()
            del running[sentinel]
            if process.exitcode:
                reason = f"the process ended with {process.exitcode}; it may take {SECONDS} seconds of a processor"
                result = {"name": name, "class": toy_zoo.class_name(name), "state": FAILED, "reason": reason}
                result |= {"seconds": SECONDS, "step": "process", "recipes": recipes, "code": code}
                (work / f"{name}.json").write_text(json.dumps(result))
            result = json.loads((work / f"{name}.json").read_text())
            print(f"{name:28} {result['state'][:10]:10} {result['seconds']:6} s  {result['reason'][:150]}", flush=True)


def table(results: list[dict[str, Any]], code: str) -> str:
    """docs/architectures.md."""
    states = (FAILED, REFUSED, PARTLY, BROKEN, WORKS)
    by_state = {state: [r for r in results if r["state"] == state] for state in states}
    count = {state: len(found) for state, found in by_state.items()}
    able = len(results) - count[BROKEN]
    tried = [name for name in RECIPES if all(name in r.get("recipes", ()) for r in results)]
    missing, stale = len(toy_zoo.CLASSES) - len(results), sum(r.get("code") != code for r in results)
    lines = [
        "# Architectures",
        "",
        f"Types of language models of transformers {transformers.__version__}, tried on toys with random weights:",
        f"`doctor`; {', '.join(f'`{name}`' for name in tried)}; `verify`; `eval perplexity` against a plain loop over",
        "`from_pretrained` of the artifact; `load` against `from_pretrained`; the dense export against both.",
        f"Logits must agree within {TOLERANCE:g} of the largest. Weights must be those of the toy, rounded; and logits",
        f"may move {TIMES:g} times as far as they do by noise of the same size in the same weights. Types with a tower",
        "for images are run on text. This page is made by",
        "",
        "```console",
        "$ python scripts/sweep.py" + "".join(f" --recipe {name}" for name in tried if tried != list(RECIPES)),
        "```",
        "",
        f"**{count[WORKS]} of the {able} types that transformers itself can run on text work",
        f"({count[WORKS] / max(able, 1):.1%}).** {count[PARTLY]} work with recipes alone that need no calibration,",
        f"{count[REFUSED]} are refused, with the reason below, and {count[FAILED]} fail.",
        f"{count[BROKEN]} others cannot be made, loaded or run on text alone by transformers itself.",
        *([f"{missing} types have not been tried yet."] if missing else []),
        *([f"{stale} results are of an earlier state of the code."] if stale else []),
        "",
    ]
    for state in [state for state in states[:-1] if by_state[state]]:
        lines += [f"## {state[0].upper() + state[1:]}", "", "| type | class | reason |", "| --- | --- | --- |"]
        lines += [f"| `{r['name']}` | {r['class']} | {cell(r)} |" for r in by_state[state]] + [""]
    lines += [
        "## Works",
        "",
        "| type | class | share of the blocks' weights that can be compressed |",
        "| --- | --- | --- |",
    ]
    lines += [f"| `{r['name']}` | {r['class']} | {r.get('coverage', 0):.0%} |" for r in by_state[WORKS]]
    return "\n".join(lines) + "\n"


def cell(result: dict[str, Any]) -> str:
    """The step and the reason of a result, for a cell of a table."""
    reason = result["reason"] if len(result["reason"]) < 240 else result["reason"][:240] + " …"
    step = f"{result['step']}: " if result["state"] == FAILED else ""
    return f"{step}{reason}".replace("|", "\\|").replace("<", "&lt;")


def is_done(file: Path, recipes: list[str], code: str, keep: bool) -> bool:
    """Whether a file holds a result by all of the recipes, of this code unless `keep`."""
    result = json.loads(file.read_text()) if file.exists() else {"reason": LOST}
    # Now and then torch loses its threads in a forked process, which says nothing of a type.
    known = LOST not in result["reason"] and set(recipes) <= set(result["recipes"])
    return known and (keep or result.get("code") == code)


def main() -> None:
    """Run what has no fresh result and write the table of all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="a type, instead of all; may be repeated")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "vqcompress-sweep", metavar="DIR")
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    parser.add_argument("--again", action="store_true", help="run types that have a fresh result again")
    parser.add_argument(
        "--keep", action="store_true", help="keep results of an earlier state of the code; table says so"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="by default docs/architectures.md, without --only")
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="by default all three; may be repeated")
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    files = {name: a.work / f"{name}.json" for name in sorted(toy_zoo.CLASSES)}
    recipes, code = a.recipe or list(RECIPES), fingerprint()
    done = {name for name, file in files.items() if is_done(file, recipes, code, a.keep)}
    wanted = sorted(a.only or files)
    run_all([name for name in wanted if a.again or name not in done], a.work, a.processes, recipes, code)
    results = [json.loads(file.read_text()) for file in files.values() if file.exists()]
    if file := a.table or (None if a.only else TABLE):
        file.write_text(table(results, code), encoding="utf-8")
    print(Counter(result["state"] for result in results))


if __name__ == "__main__":
    main()
