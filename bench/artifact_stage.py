"""A registry under attack: the directory, the models in it, and what is seen of every load.

Everything an attacker could change lies in one directory; the registry is assembled of given parts, so that a
planted bug can replace one. Used by `bench.prove_artifacts`.
"""

import hashlib
import itertools
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from app.ai.artifact_loading import JOBLIB_GLOBALS, SKOPS_NODES
from app.ai.model_bundle import ModelBundle, load_bundle, self_test
from app.ai.model_catalogue import LoadBundle, ModelCatalogue
from app.ai.model_manifest import ModelManifest, encode_manifest
from app.ai.model_registry import ModelRegistry
from app.ai.served_versions import ServedVersions
from app.errors import ArtifactError, ModelNotReadyError
from bench.artifact_mutations import Candidate, files_of
from tests.model_files import V1, V2, V3, publish, read

_PROGRAMS = frozenset(
    {"os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "ctypes.dlopen"}
)


class Assembly(NamedTuple):
    """The parts of a registry that a planted bug replaces."""

    catalogue: type[ModelCatalogue] = ModelCatalogue
    checks_signatures: bool = True
    remembers: bool = True
    load: LoadBundle = load_bundle


class Watch:
    """Stands in front of the deserialiser and counts; `genuine` are the models that may come through."""

    def __init__(self, load: LoadBundle) -> None:
        self._load = load
        self.genuine: set[tuple[str, str]] = set()
        self.unverified = self.outside = self.programs = 0

    def allow(self, artifact: Path) -> None:
        """Takes a published model for genuine."""
        self.genuine.add(_fingerprint(read(artifact), artifact.read_bytes()))

    def load(self, manifest: ModelManifest, data: bytes) -> ModelBundle:
        """Loads, in the registry's own thread, and sees what is built on the way."""
        self.unverified += _fingerprint(manifest, data) not in self.genuine
        sys.setprofile(self._see_construction)
        _watching.append(self)
        try:
            return self._load(manifest, data)
        finally:
            _watching.remove(self)
            sys.setprofile(None)

    def _see_construction(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_name == "construct" and "skops" in code.co_filename:
            node = frame.f_locals["self"]
            built = (type(node).__name__, node.module_name, node.class_name)
            self.outside += built not in SKOPS_NODES

    def see_event(self, event: str, args: tuple[object, ...]) -> None:
        """Is told what Python reports of itself while something is loaded."""
        self.outside += event == "pickle.find_class" and tuple(args) not in JOBLIB_GLOBALS
        self.programs += event in _PROGRAMS


_watching: list[Watch] = []


def _listen(event: str, args: tuple[object, ...]) -> None:
    for watch in _watching or ():  # None when the interpreter ends
        watch.see_event(event, args)


sys.addaudithook(_listen)  # an audit hook cannot be removed: while nothing is loaded it does nothing


def _fingerprint(manifest: ModelManifest, data: bytes) -> tuple[str, str]:
    return hashlib.sha256(encode_manifest(manifest)).hexdigest(), hashlib.sha256(data).hexdigest()


class Stage:
    """A registry over a directory where one signed model serves, and everything needed to attack it."""

    def __init__(self, folder: Path, assembly: Assembly) -> None:
        self.models, self.mark, self._var = folder / "models", folder / "mark", folder / "var"
        self._assembly, self._key = assembly, Ed25519PrivateKey.generate()
        self.watch = Watch(assembly.load)
        older = publish(folder / "older", V1, signing_key=self._key)
        self._kept = publish(folder / "kept", V2, signing_key=self._key)
        self._fresh = {
            fmt: publish(folder / fmt, V3, fmt=fmt, seed=3, signing_key=self._key)
            for fmt in ("joblib", "skops")
        }
        self._older, self._turns = older, itertools.count(1)
        for artifact in (older, self._kept, *self._fresh.values()):
            self.watch.allow(artifact)
        self.unserved = self.older_served = 0
        self.reasons: Counter[str] = Counter()
        shutil.copytree(self._kept.parent, self.models)
        self.registry = self.open_registry()
        self._good = self.registry.load().ref

    def open_catalogue(self) -> ModelCatalogue:
        """Returns a catalogue that remembers nothing of what it refused."""
        keys = [self._key.public_key().public_bytes_raw()] if self._assembly.checks_signatures else []
        return self._assembly.catalogue(self.models, trusted_keys=keys, load=self.watch.load)

    def open_registry(self) -> ModelRegistry:
        """Returns what a service has after a restart."""
        served = ServedVersions(self._var) if self._assembly.remembers else None
        return ModelRegistry(
            self.open_catalogue(),
            served=served,
            on_load=lambda report: self.reasons.update([report.reason or "loaded"]),
        )

    @contextmanager
    def candidate(self, fmt: str) -> Iterator[Candidate]:
        """Yields a newer model just published; afterwards only the good one is there again."""
        for path in files_of(self._fresh[fmt]):
            shutil.copy(path, self.models / path.name)
        artifact = self.models / self._fresh[fmt].name
        try:
            yield Candidate(artifact, self.models / self._kept.name, self._older, self._key)
        finally:
            self.models.chmod(0o755)
            kept = {path.name for path in files_of(self._kept)}
            for path in self.models.iterdir():
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                elif path.name not in kept:
                    path.unlink()
            for path in files_of(self._kept):
                if not (self.models / path.name).exists():
                    shutil.copy(path, self.models / path.name)

    def look(self) -> None:
        """Has the registry look at the disk, and counts it if the good model does not serve after that."""
        for path in self.models.iterdir():
            # Files changed within one tick of the clock would look the same to the registry's memory.
            if self._kept.stem not in path.name:
                turn = next(self._turns)
                os.utime(path, ns=(turn, turn), follow_symlinks=False)
        try:
            bundle = self.registry.load()
            self_test(bundle)
            self.unserved += bundle.ref != self._good
        except (ArtifactError, ModelNotReadyError):
            self.unserved += 1

    def restart(self) -> None:
        """Starts anew where only an older model lies, and counts it if that one serves."""
        registry = self.open_registry()
        try:
            self.older_served += registry.load().ref != self._good
        except ModelNotReadyError:
            pass
        finally:
            registry.close()

    def count_marks(self) -> int:
        """Returns whether a payload has run, and takes its mark away."""
        found = self.mark.exists()
        self.mark.unlink(missing_ok=True)
        return int(found)


@contextmanager
def planted_module(folder: Path, mark: Path) -> Iterator[None]:
    """Puts a module on the path whose import leaves a mark."""
    (folder / "planted_module.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Planted: pass\n"
    )
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("planted_module", None)
