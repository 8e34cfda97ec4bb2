"""What people see while `quantize` runs: a live table on a terminal, a line per block where there is none."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column, Table

from vqcompress.cli.console import console, leads
from vqcompress.evaluate.read_report import mean
from vqcompress.evaluate.wording import duration

Watch = Callable[[str, dict[str, Any]], None]
# Rows of the table: the newest targets.
RECENT = 8


class _Run:
    """Counts what a run of quantize has done, in weights: blocks differ in size."""

    def __init__(self) -> None:
        self.weights: dict[str, int] = {}
        self.earlier: set[str] = set()
        # What is left besides.
        self.only = ""
        self._begin(0)

    def _begin(self, total: int) -> None:
        self.done, self.total, self.start = 0, total, time.perf_counter()
        # What was done at the end of the last block, and when.
        self.mark = (0, self.start)

    def plan(self, facts: dict[str, Any]) -> None:
        """Start counting; what an earlier run did costs little and is left out."""
        self.earlier, plan = set(facts["done"]), facts["plan"]
        blocks = [block for block in plan.blocks if block.name not in self.earlier]
        self.weights = {t.name: t.weights for block in blocks for t in plan.compressed(block)}
        self.only = " for the blocks" if plan.goes_on else ""
        self._begin(sum(self.weights.values()))

    def after(self, facts: dict[str, Any]) -> bool:
        """Count what comes after the blocks; whether a log tells it: the beginning, and each eighth."""
        if not facts["done"]:
            self.weights, self.only = {}, ""
            self._begin(facts["total"])
        before, self.done = self.done, facts["done"]
        self.mark = self.done, time.perf_counter()
        return not self.done or self.done * 8 // self.total > before * 8 // self.total

    def rate(self) -> float:
        """Weights per second so far."""
        return self.done / max(time.perf_counter() - self.start, 1e-9)

    def left(self) -> str:
        """The time left by whole blocks, which take time before and after their weights; in the first by weights."""
        if not 0 < self.done < self.total:
            return ""
        done, now = (self.done, time.perf_counter()) if not self.mark[0] else self.mark
        rest = (self.total - done) / done * (now - self.start) - (time.perf_counter() - now)
        return f"about {duration(max(rest, 0.0))} left{self.only}"


class _Screen:
    """The newest targets in a table, and below it a bar with what is done, the rate and the time left."""

    def __init__(self) -> None:
        self.run, self.recent = _Run(), deque[tuple[str, ...]](maxlen=RECENT)
        # Target → number of its block, and its path there.
        self.places: dict[str, tuple[str, str]] = {}
        # In a narrow terminal the bar gets shorter, then the end of the other text goes.
        texts = [
            TextColumn(f"{{task.{field}}}", markup=False, table_column=Column(no_wrap=True, min_width=width))
            for field, width in (("description", 11), ("fields[rest]", 0))
        ]
        self.bar = Progress(SpinnerColumn(), texts[0], BarColumn(20), texts[1])
        self.task = self.bar.add_task("planning", total=None, rest="")

    def __rich__(self) -> RenderableType:
        """What is drawn ten times a second, so that the time left runs down."""
        if self.run.done:
            rest = f"{self.run.left()}  " + (f"{self.run.rate() / 1e6:.2f} M weights/s" if self.run.weights else "")
            self.bar.update(self.task, rest=rest.strip())
        rows = Table("block", "target", box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("bits", "error"):
            rows.add_column(title, justify="right", min_width=len(title))
        for column in rows.columns:
            column.no_wrap = True
        # Another thread draws, while rows are added.
        for row in list(self.recent):
            rows.add_row(*row)
        return Group(rows, self.bar) if self.recent else self.bar

    def draw(self, event: str, facts: dict[str, Any]) -> None:
        """Take note of an event of `quantize`."""
        place = f"{facts['index'] + 1}/{facts['count']}" if "index" in facts else ""
        if event == "measure":
            text = f"choosing settings, block {place}"
            self.bar.update(self.task, description=text, total=facts["count"], completed=facts["index"])
        elif event == "plan":
            self.run.plan(facts)
            blocks = facts["plan"].blocks
            numbers = {block.name: f"{n}/{len(blocks)}" for n, block in enumerate(blocks, 1)}
            self.places = {t.name: (numbers[block.name], block.local(t)) for block in blocks for t in block.targets}
            self.bar.update(self.task, total=self.run.total or 1, completed=0)
        elif event == "block":
            self.bar.update(self.task, description=f"block {place}")
        elif event == "target":
            self.run.done += self.run.weights[facts["name"]]
            row = facts["row"]
            figures = f"{row['bits_per_weight']:.2f}", f"{row['relative_error']:.2e}"
            self.recent.append((*self.places[facts["name"]], *figures))
            self.bar.update(self.task, completed=self.run.done)
        elif event == "done":
            self.run.mark = self.run.done, time.perf_counter()
        elif event == "after":
            self.run.after(facts)
            text = f"{facts['what']} {facts['done']}/{facts['total']}"
            self.bar.update(self.task, description=text, total=facts["total"], completed=facts["done"], rest="")


@contextmanager
def watching() -> Iterator[Watch]:
    """A `watch` for quantize: a live table on a terminal, else a line per block on stderr."""
    if not leads():
        yield lambda event, facts: None
    elif sys.stderr.isatty():
        screen = _Screen()
        with Live(screen, console=console(stderr=True), transient=True, refresh_per_second=10):
            yield screen.draw
    else:
        run = _Run()
        yield lambda event, facts: _log(run, event, facts)


def _blocks(count: int) -> str:
    return f"{count} block{'s' * (count != 1)}"


def _log(run: _Run, event: str, facts: dict[str, Any]) -> None:
    if event == "measure":
        text = f"block {facts['index'] + 1}/{facts['count']} {facts['name']}: measuring what each setting costs"
    elif event == "plan":
        run.plan(facts)
        done, left = len(run.earlier), len(facts["plan"].blocks) - len(run.earlier)
        resumed = f", {_blocks(done)} {'is' if done == 1 else 'are'} done already" if done else ""
        text = f"{len(run.weights)} weight{'s' * (len(run.weights) != 1)} in {_blocks(left)} to do{resumed}"
        if not facts["plan"].targets:
            text = f"the weights stay as they are: {_blocks(left)} to copy{resumed}"
    elif event == "target":
        run.done += run.weights[facts["name"]]
        return
    elif event == "after" and run.after(facts):
        text = f"{facts['what']} {facts['done']}/{facts['total']}" + (f", {run.left()}" if run.left() else "")
    elif event == "done":
        run.mark = run.done, time.perf_counter()
        text = f"block {facts['index'] + 1}/{facts['count']} {facts['name']}: "
        rows = facts["record"]["targets"]
        if facts["name"] in run.earlier:
            text += "done by an earlier run"
        elif not run.weights:
            return
        elif not rows:
            text += "nothing to compress"
        else:
            bits, error = (mean(rows, key) for key in ("bits_per_weight", "relative_error"))
            text += f"{len(rows)} weight{'s' * (len(rows) != 1)}, {bits:.2f} bits, relative error {error:.3g}, "
            text += duration(facts["record"]["seconds"]) + (f", {run.left()}" if run.left() else "")
    else:
        return
    print(text, file=sys.stderr, flush=True)
