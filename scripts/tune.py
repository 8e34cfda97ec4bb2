"""Measures launch configs of kernels on this GPU and writes the fastest into the launch table of the package.

Usage: python scripts/tune.py [--only CASE ...] [--rows N ...] [--dtype TYPE] [--limit SECONDS] [--again]
       python scripts/tune.py --dry-run [--arch ARCH]

For every product of kernel_cases.py, every number of rows and every mixture of experts the candidates are compiled at
once, those that do not fit or that spill are dropped, the others are timed, and the fastest is kept. Where codewords
come from a table, the fastest few are also timed with the hot entries that cost no resident program (see
`ahead.hot_entries`).
Then the ways to multiply (tiles, a decoded weight and cuBLAS) are timed with that; last coded caches
of keys and values, and the searches of quantization itself. The table is written after every place, so a run that is
cut off keeps what it has; a later one goes on where configs are missing. --dry-run goes through tiny places without a
GPU, launches and compiles nothing, and fails if any launcher would have to guess afterwards.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast
from unittest import mock

import ahead
import candidates
import torch
import triton
from gpu_clock import LEAST, copies, seconds
from kernel_cases import (
    CACHES,
    CASES,
    EXPERTS,
    SHAPES,
    TINY,
    TINY_CACHES,
    TINY_EXPERTS,
    Cache,
    Case,
    Shape,
    by_kernel,
    grouped_by_kernel,
    random_rows,
)

from vqcompress.kv_cache import kernel as kv
from vqcompress.methods.fp8 import kernel as fp8
from vqcompress.methods.int8 import kernel as int8
from vqcompress.methods.triton import launch, rotate
from vqcompress.methods.triton.launch import Call, Config, DeviceProperties
from vqcompress.methods.vq import kernel_dequantize as dequantize
from vqcompress.methods.vq import kernel_multiply
from vqcompress.methods.vq import kernel_nearest as nearest
from vqcompress.methods.vq import viterbi_kernel as viterbi

# Most configs of one kernel that are tried at one place.
MOST = 24
# Number of the fastest that are also tried with hot entries.
FEW = 4
# Vectors, and sequences of a trellis, that a search is given at once: by a column of a weight, or by many.
VECTORS, SEQUENCES, BEAM = (256, 1024, 4096), (4, 16, 64, 256), 4
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Place:
    """An entry of the table: the config to try there, and the call to time, on one of `made()` after the other.

    one: the first of them. splits: numbers of hot entries, most first.
    """

    kernel: str
    rows: int
    shape: tuple[int, ...]
    options: Sequence[Config]
    call: Callable[[Any], Any]
    one: Any
    made: Callable[[], Sequence[Any]]
    splits: Sequence[int] = ()

    @property
    def key(self) -> str:
        """Of the entry."""
        return launch.key(self.rows, self.shape)

    def launches(self, option: Config, gpu: DeviceProperties) -> list[Call]:
        """The launches of the call with some config."""
        with candidates.trying(self.kernel, option), launch.recording(gpu) as calls:
            self.call(self.one)
        return calls


def _products(name: str, gpu: DeviceProperties, rows: int, shape: Shape) -> list[Config]:
    """Config to try for an INT8 or FP8 product: the guess is always one, so what is kept cannot be slower."""
    kernels, found = (int8, candidates.of_int8) if name == "int8" else (fp8, candidates.of_fp8)
    return candidates.distinct([kernels.default_config(gpu, rows, *shape)], found(gpu, rows, *shape))


class Places:
    """The places to tune on a device; without memory on `meta`.

    Places come one by one, since later ones depend on what was chosen: how many partial sums are added up, say.
    """

    def __init__(self, gpu: DeviceProperties, device: torch.device, dtype: torch.dtype):
        self.gpu, self.device, self.dtype = gpu, device, dtype

    def product(self, case: Case, shape: Shape, rows: int) -> Iterator[Place]:
        """Config of one product, and of what comes before and after it."""
        x_TI = random_rows(rows, shape[1], self.device, self.dtype)
        method, one = cast(Any, case.method), case.parts(shape, self.device, self.dtype)

        @cache
        def weights() -> list[Any]:
            number = 1 if self.device.type == "meta" else copies(case.bytes(shape))
            four = [case.parts(shape, self.device, self.dtype, seed) for seed in range(min(number, 4))]
            return [
                {n: p.clone() if n == "codes" else p for n, p in four[k % len(four)].items()} for k in range(number)
            ]

        def multiplied(route: str = "") -> Callable[[Any], Any]:
            run = by_kernel(case, route)
            return lambda parts: run(x_TI, parts, shape)

        if method.name in ("int8", "fp8"):
            options = _products(method.name, self.gpu, rows, shape)
            yield Place(f"{method.name}.linear", rows, shape, options, multiplied(), one, weights)
            return
        form, sums = method.form, [x_TI.new_empty((1, rows, shape[0]), dtype=torch.float32)]
        if method.rotation:
            yield self._rotate(x_TI, one["signs"])
        element, read = self.dtype.itemsize, (one["codes"], one["table"], shape[0], form)
        routes = ["dequantize"]
        if rows <= 1024:
            routes.append("fused")
            options = candidates.of_multiply(self.gpu, rows, shape, form, 0, element)
            splits = candidates.hot_entries(form) if rows == 1 else ()
            name = kernel_multiply.name(form, rows, 0, element)
            # Timed with the addition of the slices.
            yield Place(name, rows, shape, options, multiplied("fused"), one, weights, splits)
            sums.append(kernel_multiply.multiply(x_TI, *read))

        def decoded(parts: Any) -> None:
            dequantize.dequantize(parts["codes"], parts["table"], shape, form, self.dtype)

        options = candidates.of_dequantize(form)
        yield Place(f"vq.dequantize.{form.name}", 1, shape, options, decoded, one, weights)
        yield from (self._finish(sums_STO, one["scale"], method.rotation) for sums_STO in sums)
        options = [{"route": route} for route in routes]
        yield Place(f"vq.route.{form.name}", rows, shape, options, multiplied(), one, weights)

    def experts(self, case: Case, size: tuple[int, int, int], rows: int) -> Iterator[Place]:
        """The same of a mixture (E, O, I), for `rows` rows of all experts together."""
        count, *rest = size
        shape, method = (rest[0], rest[1]), cast(Any, case.method)
        x_SI = random_rows(rows, shape[1], self.device, self.dtype)
        ends_E = (torch.arange(1, count + 1, device=self.device) * rows // count).int()
        # A mixture is larger than any cache.
        one, run = case.stacked(count, shape, self.device, self.dtype), grouped_by_kernel(case)
        made = lambda: [one] * LEAST  # noqa: E731
        call = lambda parts: run(x_SI, ends_E, parts)  # noqa: E731
        if method.name in ("int8", "fp8"):
            # Their inputs are never split.
            found = _products(method.name, self.gpu, -(-rows // count), shape)
            options = candidates.distinct(option | {"SPLIT": 1} for option in found)
            yield Place(f"{method.name}.grouped", rows, size, options, call, one, made)
            return
        form, element = method.form, self.dtype.itemsize
        options = candidates.of_multiply(self.gpu, rows, shape, form, count, element)
        yield Place(kernel_multiply.name(form, rows, count, element), rows, size, options, call, one, made)
        if "signs" in one:
            yield self._rotate(x_SI, one["signs"][0])
        sums_STO = kernel_multiply.multiply(x_SI, one["codes"], one["table"], shape[0], form, ends_E)
        yield self._finish(sums_STO, one["scale"][0], "signs" in one)

    def _rotate(self, x_TI: torch.Tensor, signs: torch.Tensor) -> Place:
        rows, columns = x_TI.shape
        options = list(candidates.of_rotate(self.gpu, columns))
        call = lambda x_TI: rotate.rotate(x_TI, signs)  # noqa: E731
        return Place("rotate", rows, (columns, 1), options, call, x_TI, lambda: [x_TI] * LEAST)

    def _finish(self, sums_STO: torch.Tensor, scale_O: torch.Tensor, rotated: bool) -> Place:
        sums, rows, columns = sums_STO.shape
        options = list(candidates.of_rotate(self.gpu, columns))
        call = lambda sums_STO: rotate.finish(sums_STO, scale_O, self.dtype, rotated)  # noqa: E731
        kernel = "finish" if rotated else "finish.plain"
        # Partial sums were just written, so they are in the cache.
        return Place(kernel, rows, (columns, sums), options, call, sums_STO, lambda: [sums_STO] * LEAST)

    def cache(self, cache: Cache) -> Iterator[Place]:
        """Attention of one token to coded keys and values."""
        one, shape = self.parts(cache, 0), (cache.queries, cache.heads, cache.channels, cache.d, cache.tokens)
        kernel = "kv.attend.turned" if cache.turned else "kv.attend"
        options = candidates.distinct(candidates.of_attend(self.gpu, shape, cache.batch))
        place = (*shape[:4], triton.next_power_of_2(cache.tokens))

        def caches() -> list[Any]:
            return [self.parts(cache, seed) for seed in range(copies(cache.bytes()))]

        yield Place(kernel, cache.batch, place, options, lambda parts: kv.attend(*parts), one, caches)

    def parts(self, cache: Cache, seed: int) -> Any:
        """Of a cache, on this device."""
        return cache.parts(self.device, self.dtype, seed)

    def searches(self, case: Case) -> Iterator[Place]:
        """The searches of quantization with a method."""
        form: Any = getattr(case.method, "form", None)
        if form is None:
            return
        if form.family == "trellis":
            codewords_S, shape = self._draw(1, 1 << form.depth)[0], (1 << form.depth, form.bits)
            options = candidates.of_walks(self.gpu, form.depth, form.bits)
            walk = lambda x_NT: viterbi.walks(x_NT, codewords_S, form.depth, form.bits, 32)  # noqa: E731
            yield from (self._search("viterbi", shape, options, walk, self._draw(n, 256)) for n in SEQUENCES)
            return
        shape = (1 << form.bits, form.d)
        entries_Kd = self._draw(*shape)
        for n in VECTORS:
            x_Nd = self._draw(n, form.d)
            options = candidates.distinct(
                [nearest.default_config(self.gpu, n, *shape)], candidates.of_nearest(self.gpu, *shape)
            )
            yield self._search("nearest", shape, options, lambda x: nearest.best(x, entries_Kd, 1), x_Nd)
            yield self._search("nearest.beam", shape, options, lambda x: nearest.best(x, entries_Kd, BEAM), x_Nd)

    def _draw(self, rows: int, columns: int) -> torch.Tensor:
        return random_rows(rows, columns, self.device, torch.float32)

    def _search(
        self, kernel: str, shape: Shape, options: list[Config], call: Callable[[Any], Any], x: torch.Tensor
    ) -> Place:
        return Place(kernel, len(x), shape, options, call, x, lambda: [x] * LEAST)


class Tuner:
    """The table of one device, and the time that is left.

    clock: seconds of a call, by the call and its arguments. compiles: drop what does not fit or spills, and find how
    many hot entries cost nothing.
    """

    def __init__(
        self,
        gpu: DeviceProperties,
        limit: float,
        again: bool,
        clock: Callable[[Any, Any], float],
        compiles: bool = True,
    ):
        self.gpu, self.clock, self.compiles = gpu, clock, compiles
        self.end, self.again, self.done = time.perf_counter() + limit, again, set[tuple[str, str]]()
        # What launchers look into, so that all that comes after a choice is measured with it.
        self.table = launch.table(gpu)

    def tune(self, place: Place) -> None:
        """Keep the fastest config of a place."""
        entries = self.table.setdefault(place.kernel, {})
        if place.key in entries and (not self.again or (place.kernel, place.key) in self.done):
            return
        self.done.add((place.kernel, place.key))
        # Of a long list, evenly spread ones.
        options = place.options[:: -(-len(place.options) // MOST)]
        launches = [place.launches(option, self.gpu) for option in options]
        if self.compiles and "route" not in options[0]:
            options = [options[n] for n in ahead.fitting(launches, self.gpu)]
        times = self._times(place, options)
        if self.compiles and place.splits:
            fastest = [option for _, _, option in sorted(times)[:FEW]]
            hot = [option | {"HOT": self.split(place, option)} for option in fastest]
            times += self._times(place, [option for option in hot if option["HOT"]], len(options))
        if not times:
            print(f"{place.kernel} {place.key}: nothing can be launched", flush=True)
            return
        took, _, entries[place.key] = min(times)
        if took:
            print(f"{place.kernel} {place.key}: {took * 1e6:.1f} µs, {entries[place.key]} of {len(times)}", flush=True)

    def split(self, place: Place, option: Config) -> int:
        """The largest number of hot entries that costs nothing with some config."""

        def launched(hot: int) -> Call:
            return next(c for c in place.launches(option | {"HOT": hot}, self.gpu) if c.kernel.__name__ == "_gemv")

        return ahead.hot_entries(place.splits, launched, self.gpu)

    def _times(self, place: Place, options: Iterable[Config], first: int = 0) -> list[tuple[float, int, Config]]:
        """Seconds of every option that can be launched, with its number."""
        found = []
        for n, option in enumerate(options, first):
            try:
                with candidates.trying(place.kernel, option):
                    found.append((self.clock(place.call, place.made()), n, option))
            except Exception as error:
                # A device may refuse what its compiler took.
                print(f"  {place.kernel} {option}: {type(error).__name__}")
        return found

    def write(self) -> None:
        """The table, for all that run after this."""
        file = Path(str(launch.table_file(self.gpu)))
        file.parent.mkdir(exist_ok=True)
        kept = {kernel: dict(sorted(places.items())) for kernel, places in sorted(self.table.items()) if places}
        file.write_text(json.dumps(kept, indent=1) + "\n")


def all_places(
    places: Places,
    cases: list[Case],
    rows: Iterable[int],
    shapes: dict[str, list[Shape]],
    mixtures: dict[str, Any],
    caches: list[Cache],
) -> Iterator[Iterator[Place]]:
    """Every place, the most important first: few rows, then many, then caches and the searches."""
    sizes = [size for some, _ in mixtures.values() for size in some]
    for count in rows:
        for shape in dict.fromkeys(shape for model in shapes.values() for shape in model):
            yield from (places.product(case, shape, count) for case in cases)
        # Tokens of a mixture have rows of several experts.
        for size in sizes:
            yield from (places.experts(case, size, 4 * count) for case in cases)
    yield from (places.cache(cache) for cache in caches)
    yield from (places.searches(case) for case in cases)


def dry_run(arch: int | str, cases: list[Case], rows: Sequence[int]) -> tuple[int, set[str]]:
    """The number of places in tiny models, and the launches that would still use a default after tuning them.

    For a device that is not here; its table is changed for this process, not written.
    """
    gpu, meta = launch.DEVICES[arch], torch.device("meta")
    tuner = Tuner(gpu, 0.0, True, lambda *call: 0.0, compiles=False)
    undecided, count, ask = set[str](), 0, launch.get_config

    def asked(kernel: str, device: Any, rows: int, shape: Any, default: Any) -> Config:
        def noted(gpu: DeviceProperties) -> Config:
            undecided.add(f"{kernel} {launch.key(rows, shape)}")
            return dict(default(gpu))

        return ask(kernel, device, rows, shape, noted)

    for dtype in TYPES.values():
        with launch.recording(gpu):
            for some in all_places(Places(gpu, meta, dtype), cases, rows, TINY, TINY_EXPERTS, TINY_CACHES):
                done = []
                for place in some:
                    tuner.tune(place)
                    done.append(place)
                with mock.patch.object(launch, "get_config", asked):
                    for place in done:
                        place.call(place.one)
                count += len(done)
    return count, undecided


def main() -> None:
    """Tune."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CASE")
    parser.add_argument("--rows", nargs="+", type=int, default=list(launch.BUCKETS))
    parser.add_argument("--dtype", choices=list(TYPES), default="bfloat16", help="of x")
    parser.add_argument("--limit", type=float, default=540, help="seconds; what is not reached by then is left out")
    parser.add_argument("--again", action="store_true", help="also what the table has")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--arch", choices=[str(arch) for arch in ahead.ARCHS], default="90", help="of a dry run")
    a = parser.parse_args()
    cases = [c for c in CASES if not a.only or c.name in a.only]
    if a.dry_run:
        count, default = dry_run(int(a.arch) if a.arch.isdigit() else a.arch, cases, a.rows)
        print(f"{count} places")
        sys.exit(f"these are still default: {', '.join(sorted(default))}" if default else 0)
    device = torch.device("cuda")
    gpu = launch.device_properties(device)
    tuner, places = Tuner(gpu, a.limit, a.again, seconds), Places(gpu, device, TYPES[a.dtype])
    with torch.inference_mode():
        for some in all_places(places, cases, a.rows, SHAPES, EXPERTS, [] if a.only else CACHES):
            for place in some:
                if time.perf_counter() > tuner.end:
                    print("out of time")
                    return
                tuner.tune(place)
                tuner.write()


if __name__ == "__main__":
    main()
