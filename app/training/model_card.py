"""The model card: one self-contained page, in HTML and in Markdown, next to the artifact.

It holds figures and column names, never a value out of a lead. Pure but for `write_model_card`. Called by
`app.training.train`.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from app.ai.model_manifest import MANIFEST_SUFFIX, ModelManifest
from app.training.report import HEADLINES, describe_data

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2733}"
    "table{border-collapse:collapse;margin:1rem 0;width:100%}"
    "td,th{border-bottom:1px solid #d8dee6;padding:.3rem .6rem;text-align:left}"
    "td{overflow-wrap:anywhere}svg{width:22rem;max-width:100%}"
)

_Rows = Sequence[Sequence[str]]
_Section = tuple[str, Sequence[str], _Rows]


def write_model_card(manifest: ModelManifest, manifest_path: Path) -> Path:
    """Writes both forms of the card beside the manifest; returns the path of the HTML one."""
    stem = manifest_path.name.removesuffix(MANIFEST_SUFFIX)
    manifest_path.with_name(f"{stem}.card.md").write_text(build_markdown_card(manifest), encoding="utf-8")
    html = manifest_path.with_name(f"{stem}.card.html")
    html.write_text(build_html_card(manifest), encoding="utf-8")
    return html


def build_markdown_card(manifest: ModelManifest) -> str:
    """Returns the card as Markdown."""
    lines = [f"# {_title(manifest)}", "", _intended_use(manifest), ""]
    for heading, head, rows in _sections(manifest):
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
        cells.insert(1, ["---"] * len(head))
        lines += [f"## {heading}", "", *(f"| {' | '.join(row)} |" for row in cells), ""]
    return "\n".join(lines)


def build_html_card(manifest: ModelManifest) -> str:
    """Returns the card as one HTML page that loads nothing."""
    title = escape(_title(manifest))
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><p>{escape(_intended_use(manifest))}</p>",
        _reliability_diagram(manifest.report["reliability"]),
    ]
    for heading, head, rows in _sections(manifest):
        body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
        parts.append(f"<h2>{escape(heading)}</h2><table><tr>{_cells('th', head)}</tr>{body}</table>")
    return "\n".join([*parts, "</body></html>\n"])


def _title(manifest: ModelManifest) -> str:
    return f"Model card: {manifest.model_id} ({manifest.model_type.replace('_', ' ')})"


def _intended_use(manifest: ModelManifest) -> str:
    within = f" within {manifest.horizon_days} days" if manifest.horizon_days else ""
    return (
        f"Estimates how likely a lead of {manifest.source} is to reach {manifest.label}{within}, to help "
        "people decide whom to call first. It describes past leads: it does not say why somebody applies, "
        "and is not meant for decisions about admission."
    )


def _sections(manifest: ModelManifest) -> list[_Section]:
    report = manifest.report
    importance = report["importance"]
    leading = [spec for spec in manifest.feature_set if spec["name"] in importance]
    by_importance = sorted(leading, key=lambda spec: -importance[spec["name"]])
    left_out = [*report["dropped"].items(), *((name, "excluded by hand") for name in report["excluded"])]
    sections: list[_Section] = [
        ("Data", ("what", "value"), describe_data(manifest)),
        (
            "Held-out metrics", ("metric", "value"),
            [(heading, f"{manifest.metrics[name]:.4f}") for name, heading in HEADLINES],
        ),
        (
            "Features (ROC AUC lost when shuffled)", ("feature", "loss", "made by", "meaning"),
            [
                (spec["name"], f"{importance[spec['name']]:.4f}", spec["transform"], spec["description"])
                for spec in by_importance
            ],
        ),
        (
            "Reliability on the test part", ("mean predicted", "share that happened", "leads"),
            [
                (f"{predicted:.3f}", f"{observed:.3f}", str(int(n)))
                for predicted, observed, n in report["reliability"]
            ],
        ),
    ]  # fmt: skip
    if left_out:
        sections.append(("Columns left out", ("column", "why"), left_out))
    if report["warnings"]:
        sections.append(("Warnings", ("what looks odd",), [(text,) for text in report["warnings"]]))
    return sections


def _reliability_diagram(bins: Iterable[Sequence[float]]) -> str:
    """Draws predicted against observed; dots on the diagonal mean that 34 % is 34 in 100."""
    dots = "".join(
        f'<circle cx="{10 + 200 * predicted:.1f}" cy="{210 - 200 * observed:.1f}" r="4" fill="#1769aa"/>'
        for predicted, observed, _ in bins
    )
    return (
        '<figure><svg viewBox="0 0 220 220" role="img" aria-label="Reliability diagram">'
        '<rect x="10" y="10" width="200" height="200" fill="none" stroke="#8a97a6"/>'
        f'<path d="M10 210 210 10" stroke="#8a97a6" stroke-dasharray="4"/>{dots}</svg>'
        "<figcaption>Predicted probability (across), share that happened (up), test part.</figcaption>"
        "</figure>"
    )


def _cells(tag: str, row: Iterable[str]) -> str:
    return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
