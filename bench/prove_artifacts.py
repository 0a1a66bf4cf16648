"""No unverified byte reaches a deserialiser, and the last good model serves on.

A registry serves a signed model. Beside it a newer one is published and damaged or forged, over and over;
then hostile files are put in its place, without a trusted key and with one; then a thread swaps the file
while it is loaded. Counted is what reaches the deserialiser without having been verified, what a deserialiser
finds or builds outside its lists, marks that a payload left, and looks after which the good model did not
serve.

python -m bench.prove_artifacts [--long] [--seed N]
"""

import io
import itertools
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np

from app.ai.artifact_files import FoundArtifact, open_model_dir, read_verified_artifact
from app.ai.model_bundle import ModelBundle, load_bundle
from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_manifest import ModelManifest
from app.errors import ArtifactError
from app.log_setup import configure_logging
from bench.artifact_mutations import list_mutations, put_older_in_place
from bench.artifact_stage import Assembly, Stage, planted_module
from bench.figures import Figure
from bench.proof import PlantedBug, run_proof
from tests.hostile_files import hostile_files
from tests.model_files import forge, sign

PROMISE = "no unverified byte reaches a deserialiser, and the last good model serves on"
UNVERIFIED = "unverified bytes that reached a deserialiser"
STARTED = "programs started, marks left"
OLDER = "older models that served unasked"


class Sizes(NamedTuple):
    """How much is tried; `hostile` of the files there are, or all with None."""

    mutations: int
    hostile: int | None
    swaps: int


def mutate(stage: Stage, count: int, random: np.random.Generator) -> int:
    """Damages or forges `count` candidates, every kind of mutation in turn; returns how many."""
    tried = 0
    for mutation in itertools.islice(itertools.cycle(list_mutations().values()), count):
        with stage.candidate(str(random.choice(["joblib", "skops"]))) as candidate:
            mutation(candidate, random)
            stage.look()
            if mutation is put_older_in_place:
                stage.restart()
        tried += 1
    return tried


def offer_hostile(stage: Stage, files: Iterable[tuple[str, str, bytes]]) -> tuple[int, int]:
    """Offers each file with its hash made right, unsigned and then signed; returns files and marks."""
    offered = marks = 0
    for _name, fmt, data in files:
        with stage.candidate(fmt) as candidate:
            forge(candidate.artifact, data=data)
            stage.look()
            # As if its author held a trusted key: verified, so only the lists stand in its way.
            stage.watch.allow(candidate.artifact)
            sign(candidate.artifact, candidate.key)
            stage.look()
        offered += 1
        marks += stage.count_marks()
    return offered, marks


def race(stage: Stage, loads: int) -> int:
    """Loads while a thread swaps the file; returns how many loads met a file other than the signed one."""
    with stage.candidate("joblib") as candidate:
        good = candidate.artifact.read_bytes()
        evil = bytes(reversed(good))
        stop = threading.Event()

        def swap() -> None:
            spare = candidate.artifact.with_name("spare")
            for turn in itertools.count():
                if stop.is_set():
                    return
                spare.write_bytes(evil if turn % 2 else good)
                spare.rename(candidate.artifact)
                with candidate.artifact.open("r+b") as file:
                    file.write(good if turn % 2 else evil)

        racer = threading.Thread(target=swap)
        racer.start()
        try:
            return sum(not _loads(stage.open_catalogue()) for _ in range(loads))
        finally:
            stop.set()
            racer.join()


def _loads(catalogue: ModelCatalogue) -> bool:
    try:
        catalogue.load(catalogue.find()[0])
    except ArtifactError:
        return False
    return True


def measure(sizes: Sizes, seed: int, assembly: Assembly | None = None) -> Sequence[Figure]:
    """Measures the promise, with a registry of these parts."""
    with tempfile.TemporaryDirectory(prefix="leadscore-artifacts-") as name:
        stage = Stage(Path(name), assembly or Assembly())
        random = np.random.default_rng(seed)
        with planted_module(Path(name), stage.mark):
            mutated = mutate(stage, sizes.mutations, random)
            hostile = list(hostile_files(stage.mark))
            drawn = [hostile[at] for at in random.permutation(len(hostile))[: sizes.hostile]]
            offered, marks = offer_hostile(stage, drawn)
            swapped = race(stage, sizes.swaps)
        stage.registry.close()
        if assembly is None:
            print("looks:", ", ".join(f"{word} {number}" for word, number in stage.reasons.most_common()))
        return [
            Figure("mutations tried", mutated, sizes.mutations, at_least=True, unit=""),
            Figure("hostile files tried", offered, sizes.hostile or 200, at_least=True, unit=""),
            Figure("loads that met a swapped file", swapped, sizes.swaps // 10, at_least=True, unit=""),
            Figure(UNVERIFIED, stage.watch.unverified, 0, unit=""),
            Figure("objects outside the lists found or built", stage.watch.outside, 0, unit=""),
            Figure(STARTED, stage.watch.programs + marks, 0, unit=""),
            Figure("looks after which the good model did not serve", stage.unserved, 0, unit=""),
            Figure(OLDER, stage.older_served, 0, unit=""),
        ]


class HashAfterLoad(ModelCatalogue):
    """A planted bug: the hash is compared when the model is made already."""

    def _load(self, artifact: FoundArtifact) -> ModelBundle:
        with open_model_dir(self._model_dir) as descriptor:
            manifest = self._read_manifest(descriptor, artifact)
            bundle = self._load_bundle(manifest, _read_path(self._model_dir / manifest.file_name))
            read_verified_artifact(descriptor, manifest)
        return bundle


class OpensTwice(ModelCatalogue):
    """A planted bug: what is loaded is the file as it is a moment later, not the bytes that were hashed."""

    def _load(self, artifact: FoundArtifact) -> ModelBundle:
        with open_model_dir(self._model_dir) as descriptor:
            manifest = self._read_manifest(descriptor, artifact)
            read_verified_artifact(descriptor, manifest)
        time.sleep(0.002)  # a slow disk, so that a busy machine shows the bug as surely as a quiet one
        return self._load_bundle(manifest, _read_path(self._model_dir / manifest.file_name))


def _read_path(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(descriptor, 1 << 20)
    finally:
        os.close(descriptor)


def load_anything(manifest: ModelManifest, data: bytes) -> ModelBundle:
    """A planted bug: pickles are loaded without a list. Only those that leave a mark: others call worse."""
    if data[:1] == pickle.PROTO and b"system" in data:
        joblib.load(io.BytesIO(data))
    return load_bundle(manifest, data)


SHORT, LONG, BRIEF = Sizes(2_000, None, 500), Sizes(10_000, None, 5_000), Sizes(120, 200, 300)

# A planted bug meets little of what it does not show in.
EVERY_MUTATION = Sizes(len(list_mutations()), 1, 50)
HOSTILE_FILES, SWAPS = Sizes(1, 100, 50), Sizes(1, 1, 300)


def _plant(assembly: Assembly, sizes: Sizes, shows: str) -> PlantedBug:
    return PlantedBug(lambda run: measure(sizes, run.seed, assembly), shows)


PLANTED_BUGS = {
    "the hash is checked after the load": _plant(Assembly(HashAfterLoad), EVERY_MUTATION, UNVERIFIED),
    "the file is opened again after the hash": _plant(Assembly(OpensTwice), SWAPS, UNVERIFIED),
    "the signature is not checked": _plant(Assembly(checks_signatures=False), EVERY_MUTATION, UNVERIFIED),
    "a restart forgets what has served": _plant(Assembly(remembers=False), EVERY_MUTATION, OLDER),
    "a deserialiser without its lists": _plant(Assembly(load=load_anything), HOSTILE_FILES, STARTED),
}


def main() -> None:
    """Entry point of `make prove-artifacts`."""
    configure_logging("CRITICAL")
    run_proof(PROMISE, lambda run: measure(LONG if run.long else SHORT, run.seed), PLANTED_BUGS)


if __name__ == "__main__":
    main()
