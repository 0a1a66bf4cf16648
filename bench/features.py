"""What a lead costs on its way from the cells the database sent to the answer: compiled loops and NumPy.

python bench/features.py [SECONDS]     for each batch size, two seconds unless told

The shipped model, one process, one thread, the ways in turn. "Cold" is what a request meets: before each call
32 MB are read, so that neither code nor data lie in the processor's own caches. The answers are compared
before anything is timed.
"""

import sys
import time
from pathlib import Path

import numpy as np

from app.ai.column_blocks import NULL_NUMBER, NULL_TEXT
from app.ai.domain import InputColumn
from app.ai.feature_safety import apply_rules, build_verdicts
from app.ai.features import build_features
from app.ai.model_bundle import ModelBundle, load_bundle
from app.ai.model_manifest import read_manifest
from app.ai.predictor import ScoringPolicy, Stopwatch, score_leads
from app.ai.score_kernels import ScoreKernels, installed_kernels
from app.db.lead_cells import decode_batch

AS_OF = 1_780_272_000.0
SIZES = (1, 50, 2_000)
STAGES = ("decode", "features", "safety", "scoring", "calibration")
POLICY = ScoringPolicy(0.5, "max_probability")
MODELS = Path(__file__).parent.parent / "models"
OTHER_DATA = np.zeros(4 << 20)


def load_shipped_model() -> ModelBundle:
    """Returns the model of the repository."""
    (path,), (artifact,) = MODELS.glob("*.manifest.json"), MODELS.glob("*.skops")
    return load_bundle(read_manifest(path.read_bytes()), artifact.read_bytes())


def make_cells(bundle: ModelBundle, n: int) -> list[bytes]:
    """Returns `n` made-up leads as a batch row has them; a tenth of the cells is NULL."""
    random = np.random.default_rng(n)
    return [_make_column(bundle, column, random, n) for column in bundle.input_columns]


def _make_column(bundle: ModelBundle, column: InputColumn, random: np.random.Generator, n: int) -> bytes:
    absent = random.random(n) < 0.1
    if column.kind == "text":
        named = next(spec.params["levels"] for spec in bundle.feature_set.specs if column in spec.inputs)
        words = random.choice([word.title() for word in named], n)
        return b"\0".join(
            NULL_TEXT if gone else word.encode()
            for gone, word in zip(absent.tolist(), words.tolist(), strict=True)
        )
    numbers = {
        "timestamp": AS_OF + random.normal(-60, 60, n) * 86_400,
        "boolean": (random.random(n) < 0.5).astype(np.float64),
        "number": np.floor(random.exponential(5, n)),
    }[column.kind]
    bits = numbers.view(np.uint64)
    bits[absent] = NULL_NUMBER
    return bits.astype(">u8").tobytes()


def follow(bundle: ModelBundle, cells: list[bytes], n: int) -> dict[str, float]:
    """Returns the milliseconds of each stage of the one way the service takes."""
    watch = Stopwatch(time.perf_counter)
    leads = decode_batch(bundle.input_columns, cells, n)
    watch.lap("decode")  # type: ignore[arg-type]  # no stage of the service's own
    score_leads(bundle, leads, AS_OF, POLICY, watch.lap)
    return watch.stages_ms


def follow_without(bundle: ModelBundle, cells: list[bytes], n: int) -> dict[str, float]:
    """Returns the milliseconds of the stages that NumPy can do in the place of compiled loops."""

    def without() -> ScoreKernels | None:
        return None

    leads = decode_batch(bundle.input_columns, cells, n)
    watch = Stopwatch(time.perf_counter)
    matrix = build_features(leads, bundle.feature_set, AS_OF, without)
    watch.lap("features")
    checked = apply_rules(matrix, bundle.safety, without)
    build_verdicts(checked.weighted_coverage, checked.out_of_range, POLICY.min_coverage, bundle.abstain_below)
    watch.lap("safety")
    return watch.stages_ms


def measure(bundle: ModelBundle, n: int, seconds: float, *, cold: bool) -> dict[str, dict[str, float]]:
    """Returns by way and stage the median milliseconds."""
    cells, ways = make_cells(bundle, n), {"compiled": follow, "NumPy": follow_without}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    until = time.perf_counter() + seconds
    while len(taken["compiled"]) < 5 or time.perf_counter() < until:
        for name, way in ways.items():
            if cold:
                OTHER_DATA.sum()
            taken[name].append(way(bundle, cells, n))
    return {
        name: {stage: float(np.median([one[stage] for one in laps])) for stage in laps[0]}
        for name, laps in taken.items()
    }


def check(bundle: ModelBundle) -> None:
    """Compares both ways."""
    leads = decode_batch(bundle.input_columns, make_cells(bundle, 2_000), 2_000)
    compiled = build_features(leads, bundle.feature_set, AS_OF)
    reference = build_features(leads, bundle.feature_set, AS_OF, lambda: None)
    assert compiled.values.tobytes() == reference.values.tobytes()
    safe = [apply_rules(compiled, bundle.safety, find) for find in (installed_kernels, lambda: None)]
    assert safe[0].values.tobytes() == safe[1].values.tobytes()
    assert (safe[0].weighted_coverage == safe[1].weighted_coverage).all()


def main() -> None:
    """Prints for each batch size, warm and cold, the median milliseconds by stage."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    if installed_kernels() is None:
        raise SystemExit("the compiled loops are not installed")
    bundle = load_shipped_model()
    check(bundle)
    print(f"{'leads':>6} {'caches':<6} {'way':<9}" + "".join(f"{stage:>13}" for stage in (*STAGES, "all")))
    for n in SIZES:
        for cold in (False, True):
            for way, taken in measure(bundle, n, seconds, cold=cold).items():
                row = [taken.get(stage) for stage in STAGES]
                row.append(sum(taken.values()) if len(taken) == len(STAGES) else None)
                told = "".join(f"{'' if number is None else f'{number:.3f}':>13}" for number in row)
                print(f"{n:>6,} {'cold' if cold else 'warm':<6} {way:<9}{told}")


if __name__ == "__main__":
    main()
