"""Config of kernels: where they are looked up, what a multiprocessor holds, and what scripts/tune.py chooses."""

from __future__ import annotations

import ast
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vqcompress.methods.triton import launch

PACKAGE = Path(launch.__file__).resolve().parent.parent.parent
META = torch.device("meta")


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """What a test measures is forgotten."""
    pytest.importorskip("triton")
    launch.table.cache_clear()
    yield
    launch.table.cache_clear()


def lookups() -> set[tuple[str, str]]:
    """File and function of every call of `launch.get_config` in the package."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
                found |= {(file.name, function.name) for c in calls if ast.unparse(c.func) == "launch.get_config"}
    return found


@pytest.mark.parametrize("arch", [90, pytest.param("gfx942", marks=pytest.mark.slow)])
def test_no_kernel_with_settings_is_left_to_its_guess(arch: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    import tune
    from kernel_cases import CASES

    visited, ask = set[tuple[str, str]](), launch.get_config

    def asked(*arguments: Any) -> launch.Config:
        # Of the launcher, behind what the tuner puts in its place.
        frames, ours = (sys._getframe(1), sys._getframe(2)), ("tune.py", "candidates.py")
        frame = next(frame for frame in frames if Path(frame.f_code.co_filename).name not in ours)
        visited.add((Path(frame.f_code.co_filename).name, frame.f_code.co_name))
        return ask(*arguments)

    monkeypatch.setattr(launch, "get_config", asked)
    cases = [case for case in CASES if case.name in ("int8", "fp8", "learned 4,8", "trellis 2")]
    _, default = tune.dry_run(arch, cases, (1, 16))
    assert default == set()
    assert visited == lookups()
    assert len(visited) >= 5


@pytest.mark.slow
def test_a_lookup_without_a_measurement_is_noticed() -> None:
    import tune
    from kernel_cases import CASES

    class Forgetful(tune.Tuner):
        def tune(self, place: Any) -> None:
            if place.kernel != "finish":
                super().tune(place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "Tuner", Forgetful)
        _, default = tune.dry_run(90, [case for case in CASES if case.name == "trellis 2"], (1,))
    assert default
    assert all(name.startswith("finish ") for name in default)


def test_where_settings_are_kept() -> None:
    assert [launch.key(rows, (64, 32)) for rows in (0, 1, 2, 5, 4096, 9999)] == [
        f"{bucket}x64x32" for bucket in (1, 1, 4, 16, 4096, 4096)
    ]
    # The rows of all experts together, and how many experts.
    assert launch.key(8, (256, 64, 32)) == "16x256x64x32"
    assert launch.key(99999, (256, 64, 32)) == "16384x256x64x32"


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "programs"),
    [
        # 65,536 registers are 64 warps of 32, 16 of 128, 12 of 168; 129 count as 136.
        (90, 32, 0, 4, 16),
        (90, 128, 2048, 4, 4),
        (90, 129, 2048, 4, 3),
        (90, 168, 4096, 4, 3),
        (90, 255, 0, 8, 1),
        (90, 255, 0, 16, 0),
        # Each has 1 kB more than it asked for.
        (90, 32, 56 << 10, 4, 4),
        (90, 32, 57 << 10, 4, 3),
        (80, 32, 56 << 10, 4, 2),
        (90, 32, 228 << 10, 4, 0),
        (90, 16, 0, 1, 32),
        # Twice the registers of twice the threads, and no memory for the system.
        ("gfx942", 128, 32 << 10, 4, 2),
        ("gfx942", 256, 0, 4, 2),
    ],
)
def test_programs_that_a_multiprocessor_holds(
    arch: int | str, registers: int, shared: int, warps: int, programs: int
) -> None:
    from ahead import Resources

    assert Resources(registers, 0, shared, warps).resident(launch.DEVICES[arch]) == programs


def place_of(name: str, arch: int) -> Any:
    """The product of one row with a weight of the usual size, with the tuner's config to try."""
    import tune
    from kernel_cases import CASES

    case = next(case for case in CASES if case.name == name)
    places = tune.Places(launch.DEVICES[arch], META, torch.bfloat16).product(case, (4096, 4096), 1)
    with launch.recording(arch):
        return next(place for place in places if place.splits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tile"),
    [
        ("learned 4,8", (32, 128, 4)),
        ("learned 2x8", (32, 256, 4)),
    ],
)
def test_hot_entries_take_only_what_is_left(name: str, tile: tuple[int, int, int]) -> None:
    """On sm_90: as many programs are resident as without, and with the next larger number fewer, or there is none."""
    import ahead
    import tune

    gpu, place = launch.DEVICES[90], place_of(name, 90)
    option = next(o for o in place.options if (o["BO"], o["BI"], o["num_warps"]) == tile)
    split = tune.Tuner(gpu, 0.0, False, lambda *call: 0.0).split(place, option)

    def used(hot: int) -> ahead.Resources:
        (call,) = (c for c in place.launches(option | {"HOT": hot}, gpu) if c.kernel.__name__ == "_gemv")
        return ahead.resources(ahead.compile_call(call, 90))

    programs = used(0).resident(gpu)
    assert place.splits == [256, 128, 64, 32, 16, 8]
    assert split in (0, *place.splits)
    assert not used(split).stack
    assert used(split).resident(gpu) == programs
    for more in (hot for hot in place.splits if hot > split):
        assert used(more).stack or used(more).resident(gpu) < programs


@pytest.mark.slow
def test_some_tiles_have_room_for_a_codebook_and_some_have_not() -> None:
    """On sm_90, as the registers of one compiler fall; these are the defaults for one row."""
    import triton
    import tune

    if not triton.__version__.startswith("3.9."):
        pytest.skip("another Triton allots other registers; the rule itself is tested above")

    gpu = launch.DEVICES[90]
    found = {}
    tiles = {
        "learned 4,8": (32, 128, 4),
        "learned 2x8": (32, 256, 4),
    }
    for name, tile in tiles.items():
        place = place_of(name, 90)
        option = next(o for o in place.options if (o["BO"], o["BI"], o["num_warps"]) == tile)
        found[name] = tune.Tuner(gpu, 0.0, False, lambda *call: 0.0).split(place, option)
    assert found == {"learned 4,8": 64, "learned 2x8": 0}


@pytest.mark.slow
def test_a_place_is_compiled_and_what_spills_is_left_out() -> None:
    """The fastest by the clock is kept, a split that costs nothing is tried, and the table takes it."""
    import tune

    gpu, place = launch.DEVICES[90], place_of("learned 4,8", 90)
    kept = [o for o in place.options if (o["BO"], o["BI"], o["num_warps"]) in ((32, 128, 4), (32, 256, 4))][:2]
    # A tile that no thread has registers for.
    spilling = {**kept[0], "BO": 256, "BI": 256, "num_warps": 4}
    place = replace(place, options=[spilling, *kept], splits=[64])
    tried = []

    def clock(call: Any, weights: Any) -> float:
        tried.append(launch.get_config(place.kernel, META, 1, (), lambda gpu: {}))
        return 1.0 if tried[-1].get("HOT") else 2.0

    tuner = tune.Tuner(gpu, 60.0, False, clock)
    tuner.tune(place)
    assert spilling not in tried
    assert [o.get("HOT", 0) for o in tried] == [0, 0, 64]
    assert tuner.table[place.kernel][place.key]["HOT"] == 64
    assert launch.table(gpu) is tuner.table
    before = len(tried)
    tuner.tune(place)
    assert len(tried) == before
    json.dumps(tuner.table)


class StandIn:
    """What Triton asks a driver for before it launches."""

    def __init__(self, target: Any):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def test_what_is_compiled_ahead_is_what_a_launch_looks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own way to a launch, up to the launch: it finds the kernel in the cache."""
    import ahead
    import triton
    from kernel_cases import CASES, by_kernel

    x_TI = torch.empty((1, 4096), dtype=torch.bfloat16, device=META)
    with launch.recording(90) as calls:
        for case in CASES:
            by_kernel(case)(x_TI, case.parts((4096, 4096), META, torch.bfloat16), (4096, 4096))
    one_of_each = list({call.kernel: call for call in calls}.values())
    assert len(one_of_each) == 7
    monkeypatch.setattr(triton.runtime.driver, "_active", StandIn(ahead.target_of(90)))
    for call in one_of_each:
        monkeypatch.setattr(call.kernel, "device_caches", defaultdict(call.kernel.create_binder))
        looked_for = call.kernel.warmup(*call.arguments, grid=call.grid, **call.config)
        assert looked_for.hash == ahead.compile_call(call, 90).hash
