"""Damaged manifests and telemetry logs: what reads them raises what it declares, and believes no lie.

A manifest whose bytes were changed may be refused or say exactly what it said before; one that was changed
and sealed again may be taken, if it follows the schema. A log that was damaged may lose events
that were in the damage; what it does return was written. For `prove_hostile_input`.
"""

import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from app.ai.domain import StoredEvent
from app.ai.model_manifest import MANIFEST_SUFFIX, ModelManifest, read_manifest
from app.ai.telemetry_log import TelemetryLog
from app.errors import ArtifactError, TelemetryUnavailableError
from bench.hostile_cases import mutate
from bench.hostile_oracle import ACCEPTED_NEGATIVE, SERVER_ERROR, Findings, refuse_key_twice
from tests.model_files import publish

EVENTS = [
    StoredEvent(
        f"event-{number:04}", "ml.prediction.error", '{"status":422}' * (number % 7), f"request-{number}", "t"
    )
    for number in range(60)
]
SEGMENT_BYTES = 16 * 1024  # little more than the events: changed bytes are to meet one
LATER = StoredEvent("later", "ml.prediction.error", "{}", None, "t")

ODD_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        "",
        "é",
        "\x00",
        "a" * 5000,
        -1,
        2**63,
        2**64,
        10**400,
        1e308,
        -0.0,
        [],
        {},
        [[]],
        "2026",
        "../x",
    ),
    *({"a": [None]}, [1e400], "\u202e", "ﬀ", float("nan")),
)


def fuzz_manifests(seed: int, count: int, read: Callable[[bytes], ModelManifest] = read_manifest) -> Findings:
    """Reads changed manifests."""
    with tempfile.TemporaryDirectory() as folder:
        publish(Path(folder))
        (path,) = Path(folder).glob(f"*{MANIFEST_SUFFIX}")
        original = path.read_bytes()
    findings, random = Findings(), Random(seed)  # noqa: S311
    for changed, sealed in _draw_manifests(random, original, count):
        findings.note(_judge_manifest(read, changed, original, sealed=sealed), changed[-300:])
    return findings


def _draw_manifests(random: Random, original: bytes, count: int) -> Iterator[tuple[bytes, bool]]:
    lines = original.splitlines(keepends=True)
    for _ in range(count):
        kind = random.random()
        if kind < 0.4:
            yield mutate(random, original), False
        elif kind < 0.5:
            place = random.randrange(1, len(lines) - 2)
            line = random.choice(lines[1:-2])
            yield b"".join([*lines[:place], mutate(random, line, most=1), *lines[place:]]), False
        else:
            yield _change_and_seal(random, json.loads(original)), True


def _change_and_seal(random: Random, content: dict[str, Any]) -> bytes:
    for _ in range(random.randint(1, 2)):
        place: Any = content
        while True:
            key = random.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not place[key] or random.random() < 0.3:
                break
            place = place[key]
        place[key] = copy.deepcopy(random.choice(ODD_VALUES))
    if random.random() < 0.2:
        content["report"] = {"odd": random.choice((*ODD_VALUES, json.loads("[" * 600 + "]" * 600)))}
    if random.random() < 0.8:
        unsealed = {name: value for name, value in content.items() if name != "manifest_sha256"}
        content["manifest_sha256"] = hashlib.sha256(
            _write(unsealed).encode("utf-8", "surrogatepass")
        ).hexdigest()
    lines = ",\n".join(f"{json.dumps(name)}: {_write(value)}" for name, value in content.items())
    return f"{{\n{lines}\n}}\n".encode("utf-8", "surrogatepass")


def _write(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _judge_manifest(
    read: Callable[[bytes], ModelManifest], changed: bytes, original: bytes, *, sealed: bool
) -> str | None:
    try:
        read(changed)
    except ArtifactError:
        return None
    except Exception:  # noqa: BLE001 - exactly what is looked for
        return SERVER_ERROR
    try:
        content = json.loads(changed, object_pairs_hook=refuse_key_twice)
    except ValueError:
        return ACCEPTED_NEGATIVE
    return None if sealed or content == json.loads(original) else ACCEPTED_NEGATIVE


def fuzz_telemetry_logs(seed: int, count: int) -> Findings:
    """Damages a file of a closed log, opens it, reads it and goes on writing."""
    findings, random = Findings(), Random(seed)  # noqa: S311
    with tempfile.TemporaryDirectory() as name:
        sound = Path(name) / "sound"
        log = TelemetryLog(sound, segment_bytes=SEGMENT_BYTES)
        log.write(EVENTS)
        log.close()
        for number in range(count):
            damaged = Path(name) / f"damaged-{number}"
            shutil.copytree(sound, damaged)
            file = random.choice(sorted(path for path in damaged.rglob("*") if path.is_file()))
            file.write_bytes(mutate(random, file.read_bytes(), most=8))
            findings.note(_judge_log(damaged), (number, file.name))
            shutil.rmtree(damaged)
    return findings


def _judge_log(directory: Path) -> str | None:
    log = TelemetryLog(directory, segment_bytes=SEGMENT_BYTES)
    try:
        read = log.read_batch(1000).events
        log.write([LATER])
        read_again = log.read_batch(1000).events
        log.count()
    except TelemetryUnavailableError:
        return None
    except Exception:  # noqa: BLE001 - exactly what is looked for
        return SERVER_ERROR
    finally:
        log.close()
    written = {msgspec.json.encode(event) for event in [*EVENTS, LATER]}
    returned = [msgspec.json.encode(event) for event in read_again]
    lied = not written.issuperset(map(msgspec.json.encode, read)) or not written.issuperset(returned)
    return (
        ACCEPTED_NEGATIVE if lied or LATER not in read_again or len(set(returned)) < len(returned) else None
    )
