"""LitServe, as its first page shows it: `python litserve_app.py MODEL PORT`.

Runs in the environment of LitServe and imports nothing of ours. Started by `bench.peer_servers`.
"""

import sys
from typing import Any

import joblib
import litserve
import numpy as np


class Scorer(litserve.LitAPI):
    """Features in, probabilities out."""

    def setup(self, _device: str) -> None:
        """Loads the model."""
        self.model = joblib.load(sys.argv[1])

    def decode_request(self, request: dict[str, Any]) -> Any:
        """Returns the features (n, k)."""
        return np.array(request["features"])

    def predict(self, features: Any) -> Any:
        """Returns the probabilities (n,)."""
        return self.model.predict_proba(features)[:, 1]

    def encode_response(self, probability: Any) -> dict[str, Any]:
        """Returns the body of the answer."""
        return {"probability": probability.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Scorer(), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="error")
