"""Ray Serve, one replica: `python ray_app.py MODEL PORT`.

Runs in the environment of Ray and imports nothing of ours. Started by `bench.peer_servers`.
"""

import sys

import joblib
import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse


@serve.deployment
class Scorer:
    """Features in, probabilities out."""

    def __init__(self, model: str) -> None:
        self.model = joblib.load(model)

    async def __call__(self, request: Request) -> JSONResponse:
        """Answers one request."""
        features = np.array((await request.json())["features"])
        return JSONResponse({"probability": self.model.predict_proba(features)[:, 1].tolist()})


if __name__ == "__main__":
    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
    serve.run(Scorer.bind(sys.argv[1]), blocking=True)
