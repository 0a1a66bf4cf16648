"""The API reference as one HTML page: what the OpenAPI document says, for people.

A browsable console would be a script of somebody else's that runs beside the leads and is typed keys into.
This page loads nothing and runs nothing. Whatever is text is escaped here. Pure. Called by `main`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

_STYLE = """
:root{color-scheme:light dark;--line:#8884}
body{font:16px/1.55 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h2{margin:2.5rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--line);font-size:1.15rem}
h2,td,li{overflow-wrap:anywhere}
table{border-collapse:collapse;margin:.75rem 0;width:100%;font-size:.9rem}
td,th{border-bottom:1px solid var(--line);padding:.3rem .75rem .3rem 0;text-align:left;vertical-align:top}
pre{background:#8882;border-radius:.5rem;padding:.6rem .9rem;overflow-x:auto}
"""
_LIMITS = ("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "pattern")

Part = Mapping[str, Any]


def render_reference(document: Part, document_url: str) -> str:
    """Returns the page: every operation of the document, then every schema; it links to the document."""
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    operations = [
        (f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    contents = (
        f'<li><a href="#{escape(operation["operationId"])}"><code>{escape(name)}</code></a> '
        f"{_render_text(operation['summary'])}</li>"
        for name, operation in operations
    )
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<title>{title}</title><style>{_STYLE}</style></head><body><main><h1>{title}</h1>",
            f"<p>{_render_text(document['info']['description'])} For programs: ",
            f'<a href="{escape(document_url)}">the OpenAPI document</a>.</p><ul>{"".join(contents)}</ul>',
            *(_render_operation(name, operation) for name, operation in operations),
            *(_render_schema(name, schema) for name, schema in document["components"]["schemas"].items()),
            "</main></body></html>",
        )
    )


def _render_operation(name: str, operation: Part) -> str:
    parts = [
        f'<section id="{escape(operation["operationId"])}"><h2><code>{escape(name)}</code></h2>',
        f"<p>{_render_text(operation['summary'])}. {_render_text(operation['description'])}</p>",
    ]
    if operation.get("deprecated"):
        parts.append("<p><strong>Deprecated.</strong></p>")
    for scheme in operation.get("security", ()):
        for kind, scopes in scheme.items():
            parts.append(f"<p>Asks for a credential ({escape(kind)}) with the scope {_join(scopes)}.</p>")
    parameters = (
        (
            f"<code>{escape(parameter['name'])}</code> in the {escape(parameter['in'])}",
            _name_type(parameter["schema"]),
            _render_text(parameter.get("description", "")),
        )
        for parameter in operation.get("parameters", ())
    )
    parts.append(_render_table(("Parameter", "Type", "Meaning"), parameters))
    body = operation.get("requestBody", {"content": {}})
    for media_type, content in body["content"].items():
        described = f"{_name_type(content['schema'])}. {_render_text(body.get('description', ''))}"
        parts.append(f"<p>Body, {_render_code(media_type)}: {described}</p>")
        for label, example in content.get("examples", {}).items():
            parts.append(
                f"<p>For example ({escape(label)}):</p><pre>{escape(json.dumps(example['value']))}</pre>"
            )
    answers = (
        (
            escape(status),
            _render_text(answer["description"]),
            " or ".join(
                f"{_render_code(media_type)}: {_name_type(content['schema'])}"
                for media_type, content in answer.get("content", {}).items()
            ),
            _join(answer.get("headers", ())),
        )
        for status, answer in sorted(operation["responses"].items())
    )
    parts.append(_render_table(("Status", "Meaning", "Body", "Headers"), answers))
    return "".join([*parts, "</section>"])


def _render_schema(name: str, schema: Part) -> str:
    required = schema.get("required", ())
    fields = (
        (
            f"<code>{escape(field)}</code>{'' if field in required else ' (may be absent)'}",
            _name_type(described),
            _render_text(described.get("description", "")),
        )
        for field, described in schema.get("properties", {}).items()
    )
    return "".join(
        (
            f'<section id="{escape(name)}"><h2>{escape(name)}</h2>',
            f"<p>{_render_text(schema.get('description', ''))}</p>",
            _render_table(("Field", "Type", "Meaning"), fields) or f"<p>{_name_type(schema)}</p>",
            "</section>",
        )
    )


def _name_type(schema: Part) -> str:
    match schema:
        case {"$ref": str(reference)}:
            name = escape(reference.rpartition("/")[2])
            return f'<a href="#{name}">{name}</a>'
        case {"anyOf": list(choices)}:
            return " or ".join(map(_name_type, choices))
        case {"enum": list(values)}:
            return _join(map(json.dumps, values))
        case {"const": value}:
            return _render_code(json.dumps(value))
        case {"type": "array", "items": dict(items)}:
            named = f"array of {_name_type(items)}"
        case {"type": "object", "additionalProperties": dict(entries)}:
            named = f"object of {_name_type(entries)}"
        case _:
            named = escape(schema.get("type", "any"))
    limits = ", ".join(f"{limit} {_render_code(str(schema[limit]))}" for limit in _LIMITS if limit in schema)
    return f"{named} ({limits})" if limits else named


def _render_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{body}</table>" if body else ""


def _join(words: Iterable[str]) -> str:
    return ", ".join(map(_render_code, words))


def _render_code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _render_text(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
