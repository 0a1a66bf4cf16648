"""Hostile requests and hostile bytes, drawn from a seed: the same seed gives the same ones.

Half of what is drawn is nearly right, because nonsense is refused by the first check it meets. Every value
that is not a lead ID carries a `mark` nobody could guess, so an answer that repeats it is noticed. For
`prove_hostile_input`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from urllib.parse import quote

from bench.in_memory_service import HttpRequest

SCORE, LEGACY = "/ai/advanced-ml/predict-batch", "/ai/advanced-ml-legacy/predict-batch"
JSON = (b"content-type", b"application/json")
READING_PATHS = (
    "/ai/advanced-ml/health", "/ai/advanced-ml/models", "/livez", "/readyz", "/metrics", "/openapi.json",
    "/docs",
)  # fmt: skip

TOKENS = (
    b"NaN", b"-Infinity", b"1e999", b"-0", b"1" * 5000, b'"\\ud800"', b'"\\udc00\\ud800"', b"\xff",
    b"\xed\xa0\x80",
    b"\x00", b"\\u0000", b"\xef\xbb\xbf", b"[" * 900, b'{"a":' * 200, b'"lead_ids":', b"null", b"true", b'""',
    b",",
    b"]", b"}", b"{", b'"', b"\\", b"\xe2\x80\xae", b"//", b"'; DROP TABLE people; --", b"\r\n",
    b"1e5", b"\x7f",
)  # fmt: skip
"""Bytes that have broken somebody's parser."""


@dataclass(frozen=True)
class Case:
    """A request, and the mark that no answer may repeat."""

    request: HttpRequest
    mark: bytes


def draw_cases(seed: int, count: int, lead_ids: Sequence[str]) -> Iterator[Case]:
    """Yields requests: most of them scoring requests with a hostile body, the others hostile elsewhere."""
    random = Random(seed)  # noqa: S311
    for _ in range(count):
        mark = b"mark%016x" % random.getrandbits(64)
        draw = _draw_body_case if random.random() < 0.7 else random.choice(_ELSEWHERE)
        yield Case(draw(random, mark, lead_ids), mark)


def mutate(random: Random, data: bytes, *, most: int = 4) -> bytes:
    """Returns the bytes with a few of them changed, cut out, doubled, moved or replaced by a token."""
    mutated = bytearray(data)
    for _ in range(random.randint(1, most)):
        random.choice(_MUTATIONS)(random, mutated)
    return bytes(mutated)


def _span(random: Random, data: bytearray) -> slice:
    start = random.randint(0, len(data))
    return slice(start, min(len(data), start + random.choice((0, 1, 1, 2, 8, 64))))


def _flip(random: Random, data: bytearray) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _cut(random: Random, data: bytearray) -> None:
    del data[_span(random, data)]


def _truncate(random: Random, data: bytearray) -> None:
    del data[random.randint(0, len(data)) :]


def _double(random: Random, data: bytearray) -> None:
    place = random.randint(0, len(data))
    data[place:place] = data[_span(random, data)]


def _insert(random: Random, data: bytearray) -> None:
    place = random.randint(0, len(data))
    data[place:place] = random.choice(TOKENS)


def _replace(random: Random, data: bytearray) -> None:
    data[_span(random, data)] = random.choice(TOKENS)


def _overwrite(random: Random, data: bytearray) -> None:
    place = _span(random, data)
    data[place] = random.randbytes(len(data[place]))


_MUTATIONS: tuple[Callable[[Random, bytearray], None], ...] = (
    _flip, _cut, _truncate, _double, _insert, _replace, _overwrite,
)  # fmt: skip


def _draw_body_case(random: Random, mark: bytes, lead_ids: Sequence[str]) -> HttpRequest:
    path = random.choice((SCORE, SCORE, LEGACY))
    return HttpRequest("POST", path, b"", (JSON,), draw_body(random, mark.decode(), lead_ids))


def draw_body(random: Random, mark: str, lead_ids: Sequence[str]) -> bytes:
    """Returns a body that is well-formed, nearly so, or not at all."""
    shape = random.choice(_SHAPES)(random, mark, lead_ids)
    if not isinstance(shape, bytes):
        shape = json.dumps(shape, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    return mutate(random, shape) if random.random() < 0.5 else shape


def _some_ids(random: Random, lead_ids: Sequence[str]) -> list[str]:
    return random.choices(lead_ids, k=random.choice((1, 1, 2, 3, 10)))


def _odd_value(random: Random, mark: str) -> object:
    return random.choice(
        (
            *(
                None,
                True,
                1.5,
                -0.0,
                10**25,
                float("nan"),
                float("inf"),
                "",
                " ",
                [],
                {},
                [mark],
                {mark: mark},
            ),
            *(f"{mark} x", f"{mark}\x00", f"{mark}\ud800", f"{mark}\u202e", f"{mark}\U0001f600", f"'{mark}"),
            *(
                mark * 5,
                mark * 5000,
                f"{mark}\n",
                f" {mark}",
                f"{mark}/",
                f"_{mark}",
                f"{mark}\u2028",
                f"{mark}ä",
            ),
        )
    )


def _array(random: Random, _mark: str, lead_ids: Sequence[str]) -> object:
    return _some_ids(random, lead_ids)


def _object(random: Random, _mark: str, lead_ids: Sequence[str]) -> object:
    return {"lead_ids": _some_ids(random, lead_ids)}


def _array_with_odd_value(random: Random, mark: str, lead_ids: Sequence[str]) -> object:
    ids: list[object] = [*_some_ids(random, lead_ids)]
    ids.insert(random.randint(0, len(ids)), _odd_value(random, mark))
    return ids if random.random() < 0.5 else {"lead_ids": ids}


def _wrong_object(random: Random, mark: str, lead_ids: Sequence[str]) -> object:
    return random.choice(
        (
            {mark: _some_ids(random, lead_ids)},
            {"lead_ids": _some_ids(random, lead_ids), mark: _odd_value(random, mark)},
            {"lead_ids": _odd_value(random, mark)},
            _odd_value(random, mark),
        )
    )


def _key_twice(random: Random, mark: str, lead_ids: Sequence[str]) -> object:
    first, second = json.dumps(_some_ids(random, lead_ids)), json.dumps(_some_ids(random, lead_ids))
    name = random.choice(("lead_ids", "lead\\u005fids", mark))
    return f'{{"{name}": {first}, "lead_ids": {second}}}'.encode()


def _deep(random: Random, mark: str, _lead_ids: Sequence[str]) -> object:
    opening, closing = random.choice(((b"[", b"]"), (b'{"lead_ids":', b"}")))
    depth = random.choice((3, 900, 5000))
    return opening * depth + b'"' + mark.encode() + b'"' + closing * random.choice((0, depth))


def _long(random: Random, mark: str, lead_ids: Sequence[str]) -> object:
    return random.choice(([lead_ids[0]] * 2001, [f"{mark} "] * 2001, [], {"lead_ids": []}))


def _other_encoding(random: Random, mark: str, lead_ids: Sequence[str]) -> object:
    text = json.dumps([*_some_ids(random, lead_ids), mark])
    return text.encode(random.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7")))


_SHAPES: tuple[Callable[[Random, str, Sequence[str]], object], ...] = (
    *(_array, _array, _object, _object, _array_with_odd_value, _array_with_odd_value),
    *(_wrong_object, _key_twice, _deep, _long, _other_encoding),
)


def _hostile_query(random: Random, mark: bytes, lead_ids: Sequence[str]) -> HttpRequest:
    queries = (
        *(
            b"include=%s" % mark,
            b"%s=1" % mark,
            b"include=interval,%s" % mark,
            b"include=reasons",
            b"include=",
        ),
        *(b"include=%%00%s" % mark, b"include=%%ff%s" % mark, b"&&&=%s" % mark, b"include=" + mark * 500),
        *(b"include=interval&include=reasons", b"%%zz%s" % mark, mutate(random, b"include=interval,reasons")),
    )
    body = json.dumps(_some_ids(random, lead_ids)).encode()
    return HttpRequest("POST", random.choice((SCORE, LEGACY)), random.choice(queries), (JSON,), body)


def _hostile_header(random: Random, mark: bytes, lead_ids: Sequence[str]) -> HttpRequest:
    names = (
        *(
            b"x-request-id",
            b"traceparent",
            b"origin",
            b"content-type",
            b"content-encoding",
            b"accept",
            b"cookie",
        ),
        *(b"authorization", b"x-forwarded-for", b"forwarded", b"range", b"expect", b"host", mark),
    )
    values = (
        *(
            mark + b"\r\nx: y",
            mark + b"\t",
            mark + b"\xe4",
            b"\x1b[31m" + mark,
            mark * 400,
            b"",
            b"gzip",
            mark + b" ",
        ),
        *(
            b"00-" + b"0" * 32 + b"-" + b"1" * 16 + b"-01",
            b"application/json; charset=utf-16",
            b"text/plain",
            b"null",
        ),
    )
    given = tuple((random.choice(names), random.choice(values)) for _ in range(random.randint(1, 3)))
    kind = (JSON,) if random.random() < 0.8 else ()
    body = json.dumps(_some_ids(random, lead_ids)).encode()
    if random.random() < 0.3:
        return HttpRequest("GET", random.choice(READING_PATHS), b"", given)
    return HttpRequest("POST", random.choice((SCORE, LEGACY)), b"", (*kind, *given), body)


def _hostile_path(random: Random, mark: bytes, _lead_ids: Sequence[str]) -> HttpRequest:
    text = mark.decode()
    paths = (
        *(f"/{text}", f"//{text}{SCORE}", f"{SCORE}/{text}", f"{SCORE}/", SCORE.upper(), f"/ai/../{text}"),
        *(
            f"/ai/advanced-ml/models/{text}/card",
            "/ai/advanced-ml/models/../../etc/passwd/card",
            f"/{quote(text)}%00",
        ),
        *(
            f"/ai/advanced-ml/models/{text * 50}/card",
            f"/{text}\u202e",
            f"/@{text}",
            "/",
            "*",
            *READING_PATHS,
            SCORE,
        ),
    )
    methods = (
        "GET",
        "GET",
        "POST",
        "PUT",
        "PATCH",
        "DELETE",
        "HEAD",
        "OPTIONS",
        "TRACE",
        "CONNECT",
        text.upper(),
    )
    return HttpRequest(random.choice(methods), random.choice(paths), b"", (JSON,), mark)


_ELSEWHERE: tuple[Callable[[Random, bytes, Sequence[str]], HttpRequest], ...] = (
    _hostile_query, _hostile_header, _hostile_path,
)  # fmt: skip
