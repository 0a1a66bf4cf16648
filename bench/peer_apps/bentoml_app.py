"""BentoML, one service with one worker: `python bentoml_app.py MODEL PORT`.

Runs in the environment of BentoML and imports nothing of ours. Started by `bench.peer_servers`.
"""

import os
import sys
from pathlib import Path

import bentoml
import joblib
import numpy as np


@bentoml.service(workers=1)
class Scorer:
    """Features in, probabilities out."""

    def __init__(self) -> None:
        self.model = joblib.load(os.environ["PEER_MODEL"])

    @bentoml.api
    def predict(self, features: np.ndarray) -> np.ndarray:
        """Returns the probabilities (n,) of features (n, k)."""
        return self.model.predict_proba(features)[:, 1]


if __name__ == "__main__":
    os.environ["PEER_MODEL"] = sys.argv[1]
    here = Path(__file__)
    command = ["-m", "bentoml", "serve", f"{here.stem}:Scorer", "--working-dir", str(here.parent)]
    os.execv(sys.executable, [sys.executable, *command, "--host", "127.0.0.1", "--port", sys.argv[2]])  # noqa: S606
