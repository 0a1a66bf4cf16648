"""The versions of the libraries an artifact is bound to, as they are installed here; none is imported.

Used by `model_bundle` and `model_catalogue` to refuse an artifact, and by training to record them.
"""

from importlib.metadata import version

from app.ai.model_manifest import ArtifactFormat
from app.errors import ArtifactError


def library_versions(fmt: ArtifactFormat) -> dict[str, str]:
    """Returns the versions an artifact of this format is bound to."""
    return {library: version(library) for library in ("scikit-learn", "numpy", fmt)}


def verify_library_versions(recorded: dict[str, str], fmt: ArtifactFormat) -> None:
    """Refuses an artifact that was written with other libraries than are installed.

    Raises:
        ArtifactError: `library_mismatch`.
    """
    if recorded != library_versions(fmt):
        raise ArtifactError("library_mismatch", "The artifact was written with other library versions.")
