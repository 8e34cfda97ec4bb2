"""Progress of long commands: a bar on a terminal, and lines on stderr that a log can keep."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable
from typing import Any

from rich import progress
from rich.filesize import pick_unit_and_suffix
from rich.table import Table
from rich.text import Text

from vqcompress.cli.console import console
from vqcompress.evaluate.read_report import mean
from vqcompress.evaluate.wording import duration

# Seconds over which speed is averaged. One large weight may take minutes.
SPEED_PERIOD = 3600.0
# Off a terminal, lines per counted step.
LOG_LINES = 8
# On a terminal, targets shown above the bar.
NEWEST = 4


class RateColumn(progress.ProgressColumn):
    """Units per second, such as '61.2k weights/s'."""

    def render(self, task: progress.Task) -> Text:
        """The rate of a task; empty while it is unknown."""
        unit, suffix = pick_unit_and_suffix(int(task.speed or 0), ["", "k", "M", "G"], 1000)
        return Text(f"{task.speed / unit:.1f}{suffix} {task.fields['unit']}/s" if task.speed else "")


class StepBar(progress.Progress):
    """A bar of the current step. Off a terminal nothing is drawn, and eighths of a step are logged."""

    def __init__(self, description: str):
        figures = progress.TaskProgressColumn(), RateColumn(), progress.TimeRemainingColumn()
        super().__init__(
            *(progress.TextColumn("{task.description}", markup=False), progress.BarColumn(20), *figures),
            console=console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
            speed_estimate_period=SPEED_PERIOD,
        )
        self.id = self.add_task(description, total=None, unit="steps")

    def count(self, done: int, total: int, **task: Any) -> None:
        """Show that `done` of `total` units are done. task: the description and the unit of another step."""
        before = self.tasks[0]
        if before.total != total or done == 0:
            self.reset(self.id, total=total, **task)
        eighth = before.completed * LOG_LINES // total
        self.update(self.id, completed=done, **task)
        if self.disable and (done == 0 or done * LOG_LINES // total > eighth):
            self.console.print(f"{before.description}: {done * 100 // total} %{self.time_left()}")

    def time_left(self) -> str:
        """', about 5 s left', or nothing where the speed is not known yet or nothing is left."""
        seconds = self.tasks[0].time_remaining
        return f", about {duration(seconds)} left" if seconds else ""


class QuantizeProgress(StepBar):
    """The progress callback of `quantize`, which counts in weights because blocks differ in size.

    Above the bar are the targets that were compressed last. A line per block is printed, off a terminal too.
    """

    def __init__(self) -> None:
        # Rich draws while the constructor runs.
        self.newest: deque[dict[str, Any]] = deque(maxlen=NEWEST)
        # Number of weights of each target that this run compresses.
        self.weights: dict[str, int] = {}
        # Weights of finished blocks, which may be another process's.
        self.stored = 0
        super().__init__("planning")

    def __call__(self, event: str, facts: dict[str, Any]) -> None:
        """Show one event of `quantize`."""
        if event == "measure":
            self.count(facts["index"], facts["count"], description="measuring errors of settings", unit="blocks")
        elif event == "plan":
            self._plan(facts["plan"], set(facts["done"]))
        elif event == "block":
            self.update(self.id, description=f"block {facts['index'] + 1}/{facts['count']}")
        elif event == "target":
            self.newest.append(facts["row"])
            self.update(self.id, advance=self.weights[facts["name"]])
        elif event == "done":
            self._done(facts)
        elif event == "after":
            self.newest.clear()
            self.count(facts["done"], facts["total"], description=facts["what"], unit="steps")

    def get_renderables(self) -> Iterable[Any]:
        """The newest targets and the bar."""
        table = Table.grid(padding=(0, 2))
        for row in self.newest:
            bits, error = f"{row['bits_per_weight']:.2f} bits", f"relative error {row['relative_error']:.3g}"
            table.add_row(row["name"], row["method"], bits, error)
        return table, self.make_tasks_table(self.tasks)

    def _plan(self, plan: Any, earlier: set[str]) -> None:
        blocks = [block for block in plan.blocks if block.name not in earlier]
        self.weights = {target.name: target.weights for block in blocks for target in plan.compressed(block)}
        kept = f"; blocks done by an earlier run: {len(earlier)}" if earlier else ""
        self.console.print(f"blocks: {len(blocks)}; weights to compress: {len(self.weights)}{kept}")
        self.reset(self.id, description="compressing", total=sum(self.weights.values()), unit="weights")

    def _done(self, facts: dict[str, Any]) -> None:
        rows = facts["record"]["targets"]
        self.stored += sum(self.weights.get(row["name"], 0) for row in rows)
        self.update(self.id, completed=max(self.stored, int(self.tasks[0].completed)))
        if any(row["name"] in self.weights for row in rows):
            bits, error = (mean(rows, key) for key in ("bits_per_weight", "relative_error"))
            text = f"{len(rows)} weights, {bits:.2f} bits, relative error {error:.3g}"
            block = f"block {facts['index'] + 1}/{facts['count']} {facts['name']}"
            self.console.print(f"{block}: {text}, {duration(facts['record']['seconds'])}{self.time_left()}")
