"""Writes a card down: the same sections as one HTML page that loads nothing, and as Markdown.

Whatever is text is escaped here, once. Knows nothing of models. Pure.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

Rows = Sequence[Sequence[str]]

_STYLE = """
:root{--ink:#1c2733;--muted:#66758a;--line:#d8dee6;--band:#dbe4ee;--accent:#1769aa;--paper:#fff;--panel:#f4f7fa}
@media (prefers-color-scheme:dark){:root{--ink:#e4eaf0;--muted:#93a1b2;--line:#37424f;--band:#33475c;
--accent:#6db8f2;--paper:#14191f;--panel:#1d252e}}
:root{color-scheme:light dark}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,sans-serif;max-width:56rem;margin:0 auto;padding:1.5rem 1rem 4rem;
color:var(--ink);background:var(--paper)}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.5rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--line)}
p,li{max-width:44rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;margin:.75rem 0;min-width:60%;font-size:.9rem}
caption{text-align:left;font-weight:600;padding:.3rem 0}
td,th{border-bottom:1px solid var(--line);padding:.3rem .75rem .3rem 0;text-align:left;vertical-align:top}
td:last-child{overflow-wrap:anywhere}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}td.n{white-space:nowrap}
dl{display:flex;flex-wrap:wrap;gap:.75rem;margin:1.25rem 0}
dl div{background:var(--panel);border-radius:.5rem;padding:.6rem .9rem;flex:1 1 11rem}
dt{color:var(--muted);font-size:.85rem}dd{margin:0;font-size:1.35rem;font-weight:600}
dd small{display:block;font-size:.8rem;font-weight:400;color:var(--muted)}
figure{margin:1rem 0}figcaption{color:var(--muted);font-size:.9rem;max-width:40rem}
svg{display:block;width:100%;max-width:36rem;height:auto}svg *{stroke-linejoin:round}
@media print{:root{--ink:#000;--muted:#444;--line:#bbb;--band:#ddd;--accent:#1769aa;--paper:#fff;
--panel:#f4f7fa}body{max-width:none;font-size:11pt;padding:0}h2{break-after:avoid}
figure,tr,dl div{break-inside:avoid}
.wide{overflow:visible}}
"""
_NUMBER = re.compile(r"[-+]?[\d.,]+(?: ?%)?(?: (?:to|±) [-+]?[\d.,]+(?: ?%)?)?|-|")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a head; `caption` may be empty."""

    head: Sequence[str]
    rows: Rows
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """An SVG that is part of the page, and how to read it."""

    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what is said under it, in this order."""

    heading: str
    paragraphs: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    points: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Card:
    """A card: its title, what it says at a glance as (name, figure, remark), and its sections."""

    title: str
    glance: Sequence[tuple[str, str, str]]
    sections: Sequence[Section]


def build_html(card: Card) -> str:
    """Returns the card as one HTML page that loads nothing and runs nothing."""
    glance = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(figure)}<small>{escape(remark)}</small></dd></div>"
        for name, figure, remark in card.glance
    )
    title = escape(card.title)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<title>{title}</title>",
            f"<style>{_STYLE}</style></head><body><main><h1>{title}</h1><dl>{glance}</dl>",
            *(_section_html(section) for section in card.sections),
            "</main></body></html>\n",
        ]
    )


def build_markdown(card: Card) -> str:
    """Returns the same facts as Markdown, without charts: their figures are in the tables below them."""
    lines = [f"# {_plain(card.title)}", ""]
    lines += [
        f"- {_plain(name)}: **{_plain(figure)}** {_plain(remark)}" for name, figure, remark in card.glance
    ]
    for section in card.sections:
        lines += ["", f"## {_plain(section.heading)}", ""]
        lines += [line for text in section.paragraphs for line in (_plain(text), "")]
        for table in section.tables:
            lines += [f"**{_plain(table.caption)}**", ""] if table.caption else []
            rows = [table.head, ["---"] * len(table.head), *table.rows]
            lines += [*(f"| {' | '.join(map(_plain, row))} |" for row in rows), ""]
        lines += [f"- {_plain(text)}" for text in section.points]
    return "\n".join(lines).rstrip() + "\n"


def _section_html(section: Section) -> str:
    parts = [f"<section><h2>{escape(section.heading)}</h2>"]
    parts += [f"<p>{escape(text)}</p>" for text in section.paragraphs]
    parts += [
        f"<figure>{chart.svg}<figcaption>{escape(chart.caption)}</figcaption></figure>"
        for chart in section.charts
    ]
    parts += [_table_html(table) for table in section.tables]
    if section.points:
        parts.append(f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in section.points)}</ul>")
    return "\n".join([*parts, "</section>"])


def _table_html(table: Table) -> str:
    numeric = [all(_NUMBER.fullmatch(row[place]) for row in table.rows) for place in range(len(table.head))]
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    head = _cells_html("th", table.head, numeric)
    body = "\n".join(f"<tr>{_cells_html('td', row, numeric)}</tr>" for row in table.rows)
    return (
        f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cells_html(tag: str, row: Iterable[str], numeric: Sequence[bool]) -> str:
    open_tags = (f'<{tag} class="n">' if right else f"<{tag}>" for right in numeric)
    return "".join(f"{begin}{escape(cell)}</{tag}>" for begin, cell in zip(open_tags, row, strict=True))


def _plain(text: str) -> str:
    """Returns text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*<\[|])", r"\\\1", " ".join(text.split()))
