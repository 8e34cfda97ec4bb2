"""Try every type of language model that the installed transformers knows, on a toy of each.

Usage: python scripts/sweep.py [--only NAME ...] [--work DIR] [--processes N] [--again] [--table FILE]

For each type: `doctor`; `fp8-tile`, `smoothquant-int8` and `vq-2bit`; `verify`; `eval` against a plain loop over
`from_pretrained`; `load` against `from_pretrained`; the dense export against both. A result is a JSON file in --work; a
type that has one is not run again unless --again is given. The table is docs/architectures.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import toy_zoo
import transformers
from safetensors.torch import load_file
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
WORKS, REFUSED, BROKEN, FAILED = "works", "refused", "transformers itself fails", "FAILED"
# Tokens of a row and rows of the evaluation; samples of the calibration.
SEQLEN, WINDOWS, SAMPLES = 48, 2, 4
# Largest difference of logits, relative to the largest logit, of two ways to run the same weights in float32.
TOLERANCE = 2e-4
# Largest change of a weight in FP8, relative to the weight, as root mean squares: more is no rounding. Logits of random
# mixtures and loops say little about it, since a rounding may choose other experts.
FAR = 0.1
# Limits of a type: seconds of the processor, seconds of the clock, bytes of memory.
SECONDS, WALL, BYTES = 150, 1200, 8 * 2**30


class Failure(Exception):
    """A comparison that does not hold."""


class BrokenByTransformers(Exception):
    """A toy that transformers cannot make, save, load or run, or that differs from itself after loading."""


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
    """Save a toy. BrokenByTransformers if transformers cannot, or loads another model."""
    try:
        model = toy_zoo.toy_model(name)
        ids = rows()
        before = logits_of(model, ids)
        toy_zoo.save(model, folder)
        after = logits_of(plain(folder), ids)
    except Exception as error:
        raise BrokenByTransformers(f"{type(error).__name__}: {error}") from error
    if not after.isfinite().all():
        raise BrokenByTransformers("its logits are not finite")
    try:
        check_same("a toy and the same toy, saved and loaded", after, before)
    except Failure as error:
        raise BrokenByTransformers(str(error)) from error


def check_evaluation(folder: Path, text: Path, model: Any) -> None:
    """Failure unless `eval perplexity` is that of a plain loop over a model."""
    ids = rows(folder)
    logits = logits_of(model, ids)
    found = perplexity(str(folder), str(text), device="cpu", seqlen=SEQLEN, limit=WINDOWS)
    plain_nll = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    if not abs(found["nll_per_token"] - plain_nll) <= TOLERANCE * max(1, abs(plain_nll)):
        raise Failure(f"eval: {found['nll_per_token']:.5f} per token, a plain loop {plain_nll:.5f}")


def check_artifact(artifact: Path, toy: Path, recipe: str, text: Path) -> None:
    """Every comparison of an artifact."""
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
    if recipe == "fp8-tile":
        check_rounding(toy, exported)
    shutil.rmtree(exported)


def check_rounding(toy: Path, exported: Path) -> None:
    """Failure unless the weights of a dense export are those of the toy, rounded."""
    after = {name: tensor for file in exported.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in toy.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            change, size = (after[name].float() - tensor.float()).norm().item(), tensor.float().norm().item()
            if not change <= FAR * size:
                raise Failure(f"{name} changes by {change:.2g}, and its norm is {size:.2g}")


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


def try_type(name: str, folder: Path, recipes: list[str]) -> dict[str, Any]:
    """The result of a type: its state, the reason, and the last lines of a traceback. Works in an empty folder."""
    toy, text = folder / "toy", folder / "text.txt"
    text.write_text((toy_zoo.DEMO / "evaluation.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    result: dict[str, Any] = {"name": name, "class": toy_zoo.class_name(name), "step": "toy", "recipes": recipes}
    try:
        make_toy(name, toy)
        result["step"] = "doctor"
        refusal, facts = diagnosis(toy)
        result |= facts
        for recipe in recipes:
            result["step"] = f"quantize {recipe}"
            job = QuantizeOptions(str(toy), folder / recipe, recipe, [str(text)], SAMPLES, SEQLEN, device="cpu")
            report = quantize(job)
            result["targets"] = [target["name"] for target in report["targets"]]
            result["step"] = f"artifact {recipe}"
            check_artifact(folder / recipe, toy, recipe, text)
        if refusal:
            result["step"] = "doctor"
            raise Failure(f"doctor refuses what works: {refusal}")
        return {**result, "state": WORKS, "reason": ""}
    except BaseException as error:
        state = FAILED
        if isinstance(error, BrokenByTransformers):
            state = BROKEN
        elif isinstance(error, VQCompressError) and not result["step"].startswith("artifact"):
            state = REFUSED
        tail = [line for line in traceback.format_exc().splitlines() if "^^^" not in line and "~~~" not in line][-24:]
        reason = " ".join(str(error).split()) or type(error).__name__
        if state == FAILED and not isinstance(error, (Failure, VQCompressError)):
            reason = f"internal error: {type(error).__name__}: {reason}"
        return {**result, "state": state, "reason": reason.replace(str(folder), ""), "traceback": tail}


def child(name: str, work: Path, recipes: list[str]) -> None:
    """Run a type in this process and write its result."""
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    with tempfile.TemporaryDirectory(dir=work) as folder:
        result = try_type(name, Path(folder), recipes)
    result["seconds"] = round(time.process_time(), 1)
    (work / f"{name}.json.new").write_text(json.dumps(result, indent=1))
    (work / f"{name}.json.new").replace(work / f"{name}.json")


def run_all(names: list[str], work: Path, processes: int, recipes: list[str]) -> None:
    """Run types in processes forked from this one, which has run one and so imported everything."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        try_type("llama", Path(folder), recipes)
    context = multiprocessing.get_context("fork")
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < processes:
            name = waiting.pop(0)
            process = context.Process(target=child, args=(name, work, recipes))
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
                (work / f"{name}.json").write_text(json.dumps(result | {"seconds": SECONDS, "step": "process"}))
            result = json.loads((work / f"{name}.json").read_text())
            print(f"{name:28} {result['state']:10} {result['seconds']:6} s  {result['reason'][:150]}", flush=True)


def table(results: list[dict[str, Any]]) -> str:
    """docs/architectures.md."""
    count = {state: sum(r["state"] == state for r in results) for state in (WORKS, REFUSED, BROKEN, FAILED)}
    able = len(results) - count[BROKEN]
    share = f"{count[WORKS] / max(able, 1):.0%}"
    tried = [name for name in RECIPES if all(name in r.get("recipes", RECIPES) for r in results)]
    missing = len(toy_zoo.CLASSES) - len(results)
    lines = [
        "# Architectures",
        "",
        f"Types of language models of transformers {transformers.__version__}, tried on toys with random weights:",
        f"`doctor`; {', '.join(f'`{name}`' for name in tried)}; `verify`; `eval perplexity` against a plain loop over",
        "`from_pretrained` of the artifact; `load` against `from_pretrained`; the dense export against both.",
        f"Logits must agree within {TOLERANCE:g} of the largest. Types with a tower for images are run on text.",
        "This page is made by",
        "",
        "```console",
        "$ python scripts/sweep.py" + "".join(f" --recipe {name}" for name in tried if tried != list(RECIPES)),
        "```",
        "",
        f"**{count[WORKS]} of the {able} types that transformers itself can run on text work ({share}).**",
        f"{count[REFUSED]} are refused, with the reason below, and {count[FAILED]} fail.",
        f"{count[BROKEN]} more cannot be made, loaded or run on text by transformers itself.",
        *([f"{missing} types have not been tried yet."] if missing else []),
        "",
    ]
    for state in (FAILED, REFUSED, BROKEN):
        found = [r for r in results if r["state"] == state]
        if found:
            lines += [f"## {state[0].upper() + state[1:]}", "", "| type | class | reason |", "| --- | --- | --- |"]
            lines += [f"| `{r['name']}` | {r['class']} | {cell(r)} |" for r in found] + [""]
    lines += [
        "## Works",
        "",
        "| type | class | share of the blocks' weights that can be compressed |",
        "| --- | --- | --- |",
    ]
    lines += [f"| `{r['name']}` | {r['class']} | {r.get('coverage', 0):.0%} |" for r in results if r["state"] == WORKS]
    return "\n".join(lines) + "\n"


def cell(result: dict[str, Any]) -> str:
    """The step and the reason of a result, for a cell of a table."""
    reason = result["reason"] if len(result["reason"]) < 240 else result["reason"][:240] + " …"
    return f"{result['step']}: {reason}".replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """Run what has no result yet and write the table of all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="a type, instead of all; may be repeated")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "vqcompress-sweep", metavar="DIR")
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    parser.add_argument("--again", action="store_true", help="run types that have a result again")
    parser.add_argument("--table", type=Path, metavar="FILE", help="by default docs/architectures.md, without --only")
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="by default all three; may be repeated")
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    names = sorted(a.only or toy_zoo.CLASSES)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    recipes = a.recipe or list(RECIPES)
    run_all([n for n in names if a.again or not (a.work / f"{n}.json").exists()], a.work, a.processes, recipes)
    known = [a.work / f"{name}.json" for name in sorted(toy_zoo.CLASSES)]
    results = [json.loads(file.read_text()) for file in known if file.exists()]
    if file := a.table or (None if a.only else TABLE):
        file.write_text(table(results), encoding="utf-8")
    print({state: sum(r["state"] == state for r in results) for state in (WORKS, REFUSED, BROKEN, FAILED)})


if __name__ == "__main__":
    main()
