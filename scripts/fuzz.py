"""Damage artifacts and recipes in thousands of ways: each is refused by name, or means what it meant.

The checksums are made right again after most damages, since who damages a file on purpose would do that too. A case
fails if anything but a VQCompressError comes out, if it takes more than LIMIT seconds, if verify passes what does not
load, or if two ways of loading (ours, and `from_pretrained`) or the untouched artifact compute something else.
What a damage may change although all passes: numbers that are stored, and what config.json says of the model itself or
of SETTINGS; there the two ways of loading must still agree.

Usage: python scripts/fuzz.py ARTIFACT… [--seconds 600] [--seed 0] [--only NUMBER]
       with no ARTIFACT, three of `demo` are made first
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import vqcompress
from vqcompress.errors import VQCompressError
from vqcompress.evaluate.inspect import inspect
from vqcompress.evaluate.verify import verify
from vqcompress.model.stream import BlockStream
from vqcompress.model.tokenizer import load_tokenizer
from vqcompress.storage import recipe as recipes
from vqcompress.storage.artifact import KV_CACHE, SUMS, Artifact, checksum_lines
from vqcompress.storage.checkpoint import INDEX, sha256
from vqcompress.storage.recipe_files import packaged
from vqcompress.storage.targets import Block, Target

LIMIT = 20.0
MEMORY = 16 << 30
IDS = torch.arange(12)[None] * 11 % 200
# Knobs of how stored numbers are read, which have the same layout whatever they say.
SETTINGS = {"state_bits", "power_of_two_scales", "activations"}
TEXT_FILES = ("config.json", INDEX, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "report.json")
NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 8, 10**7, 2**31, 2**63, 10**12, 10**30, -(2**31), 0.5, 1e308, float("nan"),
    float("inf"), "", "0", "x", "../x", "/etc/passwd", ".", "model.norm", "\ud800", "\0", "é" * 300, "A" * 100_000,
    [], {}, [[]], [1, 2, 3], {"a": 1}, ["int8"], [None], "int8", "fp8", "vq", "learned", "trellis",
)  # fmt: skip
RULE_LINES = (
    "{match: 're:" + "(" * 200 + "', method: int8}", "{match: 're:(?R)', method: int8}", "2001-99-99", "!!int ''",
    "{match: '*', method: int8, smoothing: {alpha: .nan}}", "{match: '*', method: vq, bits: 1e400}", "9" * 5000,
    "{match: '*', method: vq, damping: .inf}", "{match: '*', method: vq, training_vectors: " + "9" * 400 + "}",
    "!!python/object/apply:os.system ['true']", "!!binary '%%%'", "!!bool maybe", "!!timestamp x", "? ? ? ?", "<<: 3",
)  # fmt: skip
NAMES = [f"model.layers.{i}.{n}" for i in range(3) for n in ("self_attn.q_proj", "mlp.experts.12.down_proj", "mlp.up")]
BLOCKS = [Block(f"model.layers.{i}", tuple(Target(n, (8, 8), False) for n in NAMES if f".{i}." in n)) for i in range(3)]


@dataclass
class Result:
    """cases: by kind of damage and what came of it. failures: what must not be, with the number of the case."""

    cases: Counter[tuple[str, str]]
    failures: list[str]


class Wrong(Exception):
    """Something passed that must not pass."""


def fuzz(
    artifacts: list[Path],
    seconds: float,
    seed: int = 0,
    only: int | None = None,
    alarm: bool = False,
    most: int = 10**9,
) -> Result:
    """Try cases until the time is over. only: one case, by its number. alarm: end one that hangs, as a failure."""
    result, end, number = Result(Counter(), []), time.monotonic() + seconds, only or 0
    truths = {folder: logits(vqcompress.load(folder)) for folder in artifacts}
    while time.monotonic() < end and number < most:
        draw = random.Random(f"{seed} {number}")
        kind, case = draw.choice(KINDS)
        start, said = time.monotonic(), "refused"
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, LIMIT)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                said = case(draw, artifacts, truths, Path(scratch) / "copy")
        except (VQCompressError, Wrong) as error:
            if isinstance(error, Wrong) or not str(error).strip() or "\n" in str(error).strip():
                result.failures.append(f"case {number}, {kind}: {error!r:.500}")
        except Exception as error:
            at = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
            result.failures.append(f"case {number}, {kind}: {error!r:.300} at {' '.join(at[-8:])}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0) if alarm else None
        if time.monotonic() - start > LIMIT:
            result.failures.append(f"case {number}, {kind}: took {time.monotonic() - start:.0f} s")
        result.cases[kind, said] += 1
        number += 1
        if only is not None:
            break
    return result


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    """Of some tokens."""
    out: torch.Tensor = model(IDS % model.config.get_text_config().vocab_size).logits.float()
    return out


def copied(draw: random.Random, artifacts: list[Path], into: Path) -> Path:
    """One of the artifacts, copied; returns which."""
    source = draw.choice(artifacts)
    shutil.copytree(source, into)
    return source


def seal(folder: Path) -> None:
    """Make the checksums right."""
    sums = {path.name: sha256(path) for path in folder.iterdir() if path.is_file() and path.name != SUMS}
    (folder / SUMS).write_text(checksum_lines(sums))


def judge(draw: random.Random, folder: Path, truth: torch.Tensor, same: bool) -> str:
    """Load a sealed copy in three ways. same: what loads must compute what it did."""
    passed: Exception | None = None
    try:
        verify(str(folder))
    except VQCompressError as error:
        passed = error
    try:
        ours = logits(vqcompress.load(folder))
    except VQCompressError as error:
        if passed is None:
            raise Wrong(f"verify passes what does not load: {error}") from None
        raise
    if same and not close(ours, truth):
        raise Wrong("load computes something else" + (", verify refuses" if passed else ""))
    try:
        theirs = logits(adapted(folder))
    except Exception:
        # transformers has errors of its own; it may be stricter than we are.
        return "loads only with us"
    if not close(ours, theirs) and passed is None:
        raise Wrong("from_pretrained computes something else than load")
    if passed is not None:
        raise passed
    draw.choice(USERS)(folder)
    return "the same" if close(ours, truth) else "another"


def generate(folder: Path) -> None:
    """Some tokens with coded keys and values."""
    said = Artifact(folder).cache is not None
    model: Any = vqcompress.load(folder, kv_cache=said or "kv-fp8")
    model.generate(IDS, max_new_tokens=3, do_sample=False)


def stream(folder: Path) -> None:
    """Block by block, as `eval` does."""
    blocks = BlockStream(Artifact(folder), torch.device("cpu"), torch.float32)
    states = [blocks.embed(IDS)]
    for i in range(len(blocks.blocks)):
        blocks.forward(blocks.load_block(i), i, states)
    if not close(blocks.logits(states[0]).float(), logits(vqcompress.load(folder))):
        raise Wrong("eval computes something else than load")


# What else reads an artifact, and may refuse it too.
USERS: tuple[Callable[[Path], Any], ...] = (generate, stream, load_tokenizer, lambda folder: inspect(str(folder)))


def adapted(folder: Path) -> Any:
    """The model as transformers loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for the order of sums; what is no number is one kind."""
    return a.shape == b.shape and torch.allclose(a.nan_to_num(), b.nan_to_num(), rtol=1e-3, atol=1e-4)


def stale_bytes(draw: random.Random, artifacts: list[Path], truths: Any, into: Path) -> str:
    """A bit flips, or an end is cut off, and nobody touches the checksums."""
    copied(draw, artifacts, into)
    path = draw.choice(sorted(into.iterdir()))
    damage_bytes(draw, path)
    try:
        verify(str(into))
    except VQCompressError:
        return "refused"
    raise Wrong(f"verify does not notice a change of {path.name}")


def damage_bytes(draw: random.Random, path: Path) -> None:
    """Flip, cut, insert or repeat bytes; something changes."""
    data = bytearray(path.read_bytes())
    at = draw.randrange(min(len(data), draw.choice((16, 400, len(data)))))
    match draw.randrange(5):
        case 0 | 1:
            data[at] ^= 1 << draw.randrange(8)
        case 2:
            data = data[:at]
        case 3:
            data[at:at] = draw.randbytes(draw.choice((1, 8, 100)))
        case _:
            data = data[:at] + data[at // 2 :] + b"\0"
    path.write_bytes(data)


def sealed_text(draw: random.Random, artifacts: list[Path], truths: Any, into: Path) -> str:
    """Bytes of a text file."""
    source = copied(draw, artifacts, into)
    path = into / draw.choice([name for name in TEXT_FILES if (into / name).exists()])
    damage_bytes(draw, path)
    seal(into)
    return judge(draw, into, truths[source], path.name in (INDEX, "report.json"))


def sealed_shard(draw: random.Random, artifacts: list[Path], truths: Any, into: Path) -> str:
    """Bytes of a shard, the header's more often than others."""
    source = copied(draw, artifacts, into)
    damage_bytes(draw, draw.choice(sorted(into.glob("*.safetensors"))))
    seal(into)
    return judge(draw, into, truths[source], False)


def sealed_json(draw: random.Random, artifacts: list[Path], truths: Any, into: Path) -> str:
    """Values and keys anywhere in a JSON file, in config.json those of ours."""
    source = copied(draw, artifacts, into)
    path = into / draw.choice(["config.json", "config.json", *(n for n in TEXT_FILES if (into / n).exists())])
    before, data = json.loads(path.read_text()), json.loads(path.read_text())
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        # The rest of a config.json is for transformers to check.
        damage_json(draw, data["quantization_config"] if path.name == "config.json" else data)
    text = json.dumps(data)
    if draw.random() < 0.05:
        # A second value of a key; both readers take the last.
        text = text[:1] + json.dumps(draw.choice(sorted(data))) + ": 3, " + text[1:]
    if draw.random() < 0.02:
        text = text.replace(": ", ": " + "[" * 100_000, 1)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    seal(into)
    return judge(draw, into, truths[source], path.name in (INDEX, "report.json") or no_other_model(before, data, path))


def no_other_model(before: Any, after: Any, path: Path) -> bool:
    """Whether a config still speaks of the same model and settings."""
    if path.name != "config.json":
        return path.name.startswith("tokenizer")

    def settings(config: Any) -> Any:
        try:
            methods = config["quantization_config"]["methods"]
            return [{k: v for k, v in m.items() if k in SETTINGS} for m in methods]
        except (LookupError, TypeError, AttributeError):
            return None

    model = [{k: v for k, v in config.items() if k != "quantization_config"} for config in (before, after)]
    return model[0] == model[1] and settings(before) == settings(after)


def damage_json(draw: random.Random, data: Any) -> None:
    """Change one value, key or length, at a random depth."""
    while True:
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(data[key], (dict, list)) and data[key] and draw.random() < 0.85:
            data = data[key]
            continue
        break
    value = data[key]
    match draw.randrange(9):
        case 0:
            del data[key]
        case 1:
            data[key] = copy.deepcopy(data[draw.choice(keys)])
        case 2 if isinstance(data, dict):
            data[str(draw.choice(NASTY))] = data.pop(key)
        case 3 if isinstance(value, (int, float)):
            data[key] = draw.choice((value + 1, value - 1, -value, value * 2, value * 10**6, str(value), [value]))
        case 4:
            deep: Any = value
            for _ in range(draw.choice((1, 3, 100))):
                deep = [deep] if draw.random() < 0.5 else {"a": deep}
            data[key] = deep
        case _:
            data[key] = copy.deepcopy(draw.choice(NASTY))


def sealed_header(draw: random.Random, artifacts: list[Path], truths: Any, into: Path) -> str:
    """Names, types, shapes and places in the header of a shard, the data as it was."""
    source = copied(draw, artifacts, into)
    path = draw.choice(sorted(into.glob("*.safetensors")))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    first, second = draw.choice(names), draw.choice(names)
    match draw.randrange(7):
        case 0:
            header[first]["dtype"] = draw.choice(("I8", "U8", "F32", "BF16", "F16", "I64", "F8_E4M3", "F4", "BOOL", 3))
        case 1:
            header[first]["shape"] = draw.choice(([], [0], header[first]["shape"][::-1], [1, *header[first]["shape"]]))
        case 2:
            header[first]["data_offsets"] = header[second]["data_offsets"]
        case 3:
            header[first], header[second] = header[second], header[first]
        case 4:
            header[draw.choice(("x", second + "_x", first.replace("codes", "signs"), "x." + first))] = header.pop(first)
        case 5:
            header["__metadata__"] = draw.choice(({}, {"format": "tf"}, {"format": 3}, None, {"a": "b" * 10**5}))
        case _:
            damage_json(draw, header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    seal(into)
    return judge(draw, into, truths[source], False)


def sealed_files(draw: random.Random, artifacts: list[Path], truths: Any, into: Path) -> str:
    """Files swapped, removed, added, renamed, or made a directory or a link."""
    source = copied(draw, artifacts, into)
    shards = sorted(into.glob("*.safetensors"))
    first, second = draw.sample(shards, 2)
    same = True
    match draw.randrange(8):
        case 0:
            data = first.read_bytes()
            first.write_bytes(second.read_bytes())
            second.write_bytes(data)
        case 1:
            first.unlink()
        case 2:
            first.write_bytes(second.read_bytes())
        case 3:
            (into / draw.choice(("extra.safetensors", "model.safetensors", KV_CACHE))).write_bytes(first.read_bytes())
        case 4:
            first.unlink()
            first.mkdir()
        case 5:
            other = draw.choice(artifacts) / first.name
            same = other.exists() and other.read_bytes() == first.read_bytes()
            if other.exists():
                first.write_bytes(other.read_bytes())
        case 6:
            link = draw.choice(("/dev/zero", "/dev/null", "/nowhere", str(into), str(source / first.name), first.name))
            first.unlink()
            first.symlink_to(link)
        case _:
            name = draw.choice([path.name for path in sorted(into.iterdir())])
            (into / name).rename(into / f"{name}.bin")
            # Without its checksums and report it is as `save_pretrained` leaves it.
    if draw.random() < 0.9:
        seal(into)
    return judge(draw, into, truths[source], same)


def recipe_text(draw: random.Random, artifacts: list[Path], truths: Any, into: Path) -> str:
    """A packaged recipe with another value, line or byte."""
    path = draw.choice(list(packaged().values()))
    text, lines = path.read_text(), path.read_text().splitlines()
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(lines))
        match draw.randrange(7):
            case 0:
                lines.insert(at, lines[draw.randrange(len(lines))])
            case 1:
                lines[at] = " " * draw.randrange(4) + lines[at].strip()
            case 2:
                lines += ["rules:", f"  - {draw.choice(RULE_LINES)}"]
            case 3:
                word = str(draw.choice(NASTY))
                fields = lines[at].replace("{", "").split(": ")
                lines[at] = lines[at].replace(fields[-1].strip("{} "), word[:5000], 1)
            case 4:
                lines = ["rules:", f"  - {draw.choice(RULE_LINES)}", "  - {match: '*', method: int8}"]
            case 5:
                data = recipe_data(draw, text)
                lines = recipes.yaml.safe_dump(data).splitlines() if data is not None else lines
            case _:
                letters = list("\n".join(lines))
                letters[draw.randrange(len(letters))] = draw.choice("{}[]:,&*!|>'\"%@`#?-\n\t\0\x85é\ud800")
                lines = "".join(letters).splitlines() or [""]
    into.with_suffix(".yaml").write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    found = recipes.load(str(into.with_suffix(".yaml")))
    if found.rules:
        again = recipes.parse(recipes.dump(found), "again")
        if again.fingerprint() != found.fingerprint():
            raise Wrong("a recipe that was written down means something else")
        if found.assign(BLOCKS) != again.assign(BLOCKS):
            raise Wrong("a recipe that was written down decides otherwise")
    return "means something"


def recipe_data(draw: random.Random, text: str) -> Any:
    """A recipe's data with a value or key changed."""
    data = recipes.yaml.safe_load(text)
    damage_json(draw, data)
    try:
        recipes.yaml.safe_dump(data)
    except (recipes.yaml.YAMLError, UnicodeError, RecursionError):
        return None
    return data


KINDS: list[tuple[str, Callable[..., str]]] = [
    (f.__name__.replace("_", " "), f)
    for f in (
        stale_bytes,
        sealed_text,
        sealed_shard,
        sealed_json,
        sealed_json,
        sealed_header,
        sealed_files,
        recipe_text,
    )
]


def demos(folder: Path) -> list[Path]:
    """Three artifacts of the demo checkpoint."""
    from vqcompress.pipeline.quantize import QuantizeOptions, quantize

    text = str(Path(vqcompress.__file__).parent / "demo" / "calibration.txt")
    for name in ("smoothquant-int8", "fp8-tile", "vq-2bit"):
        cache = "kv-vq-4bit" if name == "vq-2bit" else None
        quantize(QuantizeOptions("demo", folder / name, name, [text], samples=8, seqlen=128, kv_cache=cache))
    return sorted(folder.iterdir())


def quiet() -> None:
    """Nothing of transformers' on the terminal."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.utils.logging.set_verbosity(100)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def main() -> None:
    """Print cases by kind and outcome, then failures; exit code 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifacts", nargs="*", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    args = parser.parse_args()
    quiet()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))

    def hangs(*_: Any) -> None:
        raise Wrong(f"hangs for {LIMIT:.0f} s")

    signal.signal(signal.SIGALRM, hangs)
    with tempfile.TemporaryDirectory() as folder:
        artifacts = args.artifacts or demos(Path(folder))
        result = fuzz(artifacts, args.seconds, args.seed, args.only, alarm=True)
    for (kind, said), count in sorted(result.cases.items()):
        print(f"{kind:15s} {said:20s} {count:7,d}")
    print(f"{sum(result.cases.values()):,} cases, {len(result.failures)} failures")
    for failure in result.failures:
        print(failure)
    sys.exit(bool(result.failures))


if __name__ == "__main__":
    main()
