"""From the verified bytes of an artifact to a model that scores.

A service has them deserialised by a process of its own (`artifact_process`), and what comes back is checked
like any other input. A model whose arrays are not known, and any model where the compiled loops are not
installed, is deserialised in this process instead, and scikit-learn scores. `model_bundle` calls it in the
way that `wiring` chose.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec

from app.ai.artifact_process import ask
from app.ai.fitted_model import FittedModel, decode_model
from app.ai.inference import Scorer, build_compiled_scorer
from app.ai.model_manifest import ArtifactFormat
from app.ai.score_kernels import installed_kernels
from app.errors import ArtifactError

Refusal = Literal["not_allowed", "compressed", "not_loadable", "not_a_classifier"]
"""The reasons for which `artifact_loading` refuses an artifact."""


class LoadedModel(NamedTuple):
    """A model as it scores, and its arrays, None for a kind whose arrays are not known."""

    fitted: FittedModel | None
    scorer: Scorer


ReadModel = Callable[[bytes, ArtifactFormat], LoadedModel]
"""Makes a model of the verified bytes of an artifact, or raises `ArtifactError`."""


def read_here(data: bytes, fmt: ArtifactFormat) -> LoadedModel:
    """Deserialises in this process, which imports scikit-learn for it.

    Raises:
        ArtifactError: `not_a_classifier`, or see `artifact_loading.load_estimator`.
    """
    from app.ai.artifact_loading import load_estimator, refusing_other_objects  # noqa: PLC0415 - see above
    from app.ai.estimators import build_scorer_of, read_estimator  # noqa: PLC0415

    estimator = load_estimator(data, fmt)
    with refusing_other_objects():
        fitted = read_estimator(estimator)
        return LoadedModel(fitted, build_scorer_of(estimator, fitted, installed_kernels()))


def read_apart(data: bytes, fmt: ArtifactFormat) -> LoadedModel:
    """Deserialises in another process; blocks.

    Raises:
        ArtifactError: as `read_here`; `not_loadable` also if that process breaks off, takes too long, or
            answers with something else than a model.
    """
    kernels = installed_kernels()
    fitted = None if kernels is None else _understand(ask(fmt.encode() + b"\n" + data))
    if fitted is None or kernels is None:
        return read_here(data, fmt)
    return LoadedModel(fitted, build_compiled_scorer(fitted, kernels))


def _understand(answer: bytes) -> FittedModel | None:
    kind, content = answer[:1], answer[1:]
    try:
        if kind == b"E":
            raise ArtifactError(*msgspec.json.decode(content, type=tuple[Refusal, str]))
        return None if answer == b"-" else decode_model(content)
    except (ValueError, msgspec.MsgspecError) as exc:
        raise ArtifactError("not_loadable", "What was read of the artifact is no model.") from exc
