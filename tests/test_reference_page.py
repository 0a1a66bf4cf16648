"""The API reference as a page: what is text stays text."""

import copy
from html.parser import HTMLParser
from typing import Any

from app.schemas.reference_page import render_reference

HOSTILE = "</code></style></pre><script src='//evil.example'>\"&"


class Tags(HTMLParser):
    """Every tag and attribute of a page, in their order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [name for name, _ in attrs]))


def document(word: str) -> dict[str, Any]:
    """One of each thing a document may say, with a word wherever there is text."""
    schema = {
        "description": word, "required": [],
        "properties": {
            word: {"type": word, "pattern": word, "description": word},
            "b": {"$ref": f"#/{word}"}, "c": {"enum": [word]}, "d": {"const": word},
            "e": {"type": "array", "items": {"anyOf": [{"type": word}]}},
            "f": {"type": "object", "additionalProperties": {"type": word}},
        },
    }  # fmt: skip
    content = {word: {"schema": {"type": word}, "examples": {word: {"value": [word]}}}}
    operation = {
        "operationId": word, "summary": word, "description": word, "deprecated": True,
        "security": [{word: [word]}],
        "parameters": [{"name": word, "in": word, "schema": {"type": word}, "description": word}],
        "requestBody": {"description": word, "content": content},
        "responses": {word: {"description": word, "content": content, "headers": {word: {}}}},
    }  # fmt: skip
    return {
        "info": {"title": word, "version": word, "description": word},
        "paths": {word: {word: operation}},
        "components": {"schemas": {word: schema}},
    }


def test_whatever_is_text_is_escaped_wherever_it_stands() -> None:
    harmless, hostile = document("word"), document(HOSTILE)
    untouched = copy.deepcopy(hostile)
    page = render_reference(hostile, HOSTILE)
    assert Tags(page).found == Tags(render_reference(harmless, "word")).found
    assert hostile == untouched


def test_code_in_a_sentence_is_shown_as_code() -> None:
    assert "<p>A &lt; <code>b</code> For programs: " in render_reference(
        {
            "info": {"title": "", "version": "", "description": "A < `b`"},
            "paths": {},
            "components": {"schemas": {}},
        },
        "openapi.json",
    )
