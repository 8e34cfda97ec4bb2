"""Progress of long commands: a bar on a terminal, and lines on stderr that a log can keep."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from vqcompress.cli.console import console
from vqcompress.evaluate.read_report import mean
from vqcompress.evaluate.wording import duration

Callback = Callable[[str, dict[str, Any]], None]
# Seconds over which speed is averaged. One large weight may take minutes.
SPEED_PERIOD = 3600.0
# Off a terminal, lines per counted step.
LOG_LINES = 8


def plural(count: int, noun: str) -> str:
    """'1 block', '2 blocks'."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


class StepBar:
    """One bar that shows the current step. Without a terminal nothing is drawn, but the time left is still known."""

    def __init__(self, description: str):
        columns = TextColumn("{task.description}", markup=False), BarColumn(24)
        self.bars = Progress(
            SpinnerColumn(),
            *columns,
            TextColumn("{task.fields[count]}"),
            TimeRemainingColumn(),
            console=console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
            speed_estimate_period=SPEED_PERIOD,
        )
        self.id = self.bars.add_task(description, total=None, count="")

    def start(self, description: str, total: int) -> None:
        """Begin another step, of `total` units."""
        self.bars.reset(self.id, description=description, total=total)

    def advance(self, amount: int) -> None:
        """Count units of work that are done."""
        self.bars.update(self.id, advance=amount)

    def count(self, description: str, done: int, total: int) -> None:
        """Show a step of which `done` of `total` units are done; in a log at most `LOG_LINES` times."""
        task = self.bars.tasks[0]
        if task.total != total or done == 0:
            self.start(description, total)
        before = task.completed
        self.bars.update(self.id, description=description, completed=done)
        if self.bars.disable and (done == 0 or done * LOG_LINES // total > before * LOG_LINES // total):
            self.log(f"{description}: {done * 100 // total} %{self.time_left()}")

    def time_left(self) -> str:
        """', about 5 s left', or nothing where the speed is not known yet or nothing is left."""
        seconds = self.bars.tasks[0].time_remaining
        return f", about {duration(seconds)} left" if seconds else ""

    def log(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        self.bars.console.print(line)


class QuantizeProgress:
    """The progress callback of `quantize`: it counts in weights, because blocks differ in size."""

    def __init__(self, bar: StepBar):
        self.bar = bar
        # Of the blocks that this run does, the weights of each target.
        self.weights: dict[str, int] = {}
        self.earlier: set[str] = set()

    def __call__(self, event: str, facts: dict[str, Any]) -> None:
        """Show one event of `quantize`."""
        block = f"block {facts['index'] + 1}/{facts['count']}" if "index" in facts else ""
        if event == "measure":
            self.bar.count("measuring the error of each setting", facts["index"], facts["count"])
        elif event == "plan":
            self._plan(facts["plan"], set(facts["done"]))
        elif event == "block":
            self.bar.bars.update(self.bar.id, count=block)
        elif event == "target":
            self.bar.advance(self.weights[facts["name"]])
        elif event == "done" and (self.weights or facts["name"] in self.earlier):
            self.bar.log(f"{block} {facts['name']}: {self._block(facts)}")
        elif event == "after":
            self.bar.bars.update(self.bar.id, count=f"{facts['done']}/{facts['total']}")
            self.bar.count(facts["what"], facts["done"], facts["total"])

    def _plan(self, plan: Any, earlier: set[str]) -> None:
        blocks, self.earlier = [block for block in plan.blocks if block.name not in earlier], earlier
        self.weights = {t.name: t.weights for block in blocks for t in plan.compressed(block)}
        todo = f"{plural(len(self.weights), 'weight')} in {plural(len(blocks), 'block')} to compress"
        if not plan.targets:
            todo = f"{plural(len(blocks), 'block')} to copy, no weights to compress"
        self.bar.log(todo + (f"; {plural(len(earlier), 'block')} done by an earlier run" if earlier else ""))
        self.bar.start("compressing", sum(self.weights.values()))

    def _block(self, facts: dict[str, Any]) -> str:
        rows = facts["record"]["targets"]
        if facts["name"] in self.earlier:
            return "done by an earlier run"
        if not rows:
            return "nothing to compress"
        bits, error = (mean(rows, key) for key in ("bits_per_weight", "relative_error"))
        text = f"{plural(len(rows), 'weight')}, {bits:.2f} bits, relative error {error:.3g}"
        return f"{text}, {duration(facts['record']['seconds'])}{self.bar.time_left()}"


@contextmanager
def watching() -> Iterator[Callback]:
    """The progress callback to give to `quantize`."""
    bar = StepBar("planning")
    with bar.bars:
        yield QuantizeProgress(bar)


@contextmanager
def counting(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress callback that takes the units done and their total."""
    bar = StepBar(description)
    with bar.bars:
        yield lambda done, total: bar.count(description, done, total)
