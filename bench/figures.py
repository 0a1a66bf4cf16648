"""A measured number beside the limit it is held against, and the table that shows several of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """A line of a table: what is measured, what was reached, and the limit it is held against.

    One that is not `binding` is shown, and decides nothing: how fast this machine was just now.
    """

    name: str
    reached: float
    limit: float
    at_least: bool = False
    unit: str = "x"
    binding: bool = True

    @property
    def holds(self) -> bool:
        """Whether the limit is kept."""
        return self.reached >= self.limit if self.at_least else self.reached <= self.limit

    @property
    def of_time(self) -> bool:
        """Whether it is of how fast something went, which other work on the machine can spoil."""
        return self.unit in {"s", "ms", "x"}

    def cells(self) -> tuple[str, str, str, str]:
        """Returns its row of a table: name, reached, to reach, holds."""
        sign = "≥" if self.at_least else "≤"
        return (
            self.name, f"{_say(self.reached)} {self.unit}".rstrip(),
            f"{sign} {_say(self.limit)} {self.unit}".rstrip(), "yes" if self.holds else "NO",
        )  # fmt: skip


def print_figures(console: Console, title: str, figures: Sequence[Figure]) -> None:
    """Prints what was reached beside what was asked for."""
    table = Table(title=title, title_justify="left")
    for heading in ("figure", "reached", "to reach", "holds"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for figure in figures:
        table.add_row(*figure.cells())
    console.print(table)


def count(number: int, noun: str) -> str:
    """Returns the number with its noun, `1 lead` or `2,000 leads`."""
    return f"{number:,} {noun}{'s' if number > 1 else ''}"


def _say(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"
