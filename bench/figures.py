"""A measured number beside the limit it is held against, and the table that shows several of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """A line of a table: what is measured, what was reached, and the limit it is held against."""

    name: str
    reached: float
    limit: float
    at_least: bool = False
    unit: str = "x"

    @property
    def holds(self) -> bool:
        """Whether the limit is kept."""
        return self.reached >= self.limit if self.at_least else self.reached <= self.limit


def print_figures(console: Console, title: str, figures: Sequence[Figure]) -> None:
    """Prints what was reached beside what was asked for."""
    table = Table(title=title, title_justify="left")
    for heading in ("figure", "reached", "to reach", "holds"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for figure in figures:
        sign = "≥" if figure.at_least else "≤"
        table.add_row(
            figure.name, f"{_say(figure.reached)} {figure.unit}".rstrip(),
            f"{sign} {_say(figure.limit)} {figure.unit}".rstrip(), "yes" if figure.holds else "NO",
        )  # fmt: skip
    console.print(table)


def _say(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"
