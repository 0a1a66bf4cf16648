"""The peers of `make bench-peers`: what to install for each, how it is asked, and how its answer reads.

Each is asked in its own protocol, JSON over HTTP, with ready features in the body. Never talks to a peer:
that is `bench.peers`. A peer's application, as its own tutorial writes it, is `bench/peer_apps/NAME_app.py`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Peer:
    """One serving framework.

    `build_body` makes the JSON of a request for rows (n, k); `read_answer` takes the probabilities (n,) out
    of the JSON that came back.
    """

    name: str
    requirements: tuple[str, ...]
    path: str
    build_body: Callable[[Rows], Any]
    read_answer: Callable[[Any], list[float]]

    def encode(self, rows: Rows) -> bytes:
        """Returns the body of a request; every float reads back as the same float."""
        return json.dumps(self.build_body(rows), separators=(",", ":")).encode()

    def decode(self, body: bytes) -> list[float]:
        """Returns the probabilities (n,), uncalibrated, of the second class.

        Raises:
            LookupError, TypeError, ValueError: the body is not an answer of this peer.
        """
        return self.read_answer(json.loads(body))


def _build_tensor(rows: Rows) -> Any:
    # The V2 inference protocol: one tensor, flat, row after row.
    tensor = {
        "name": "features", "datatype": "FP64", "shape": [len(rows), len(rows[0])],
        "data": [value for row in rows for value in row],
    }  # fmt: skip
    return {"inputs": [tensor], "outputs": [{"name": "predict_proba"}]}


def _read_tensor(answer: Any) -> list[float]:
    (output,) = answer["outputs"]
    n, classes = output["shape"]
    if classes != 2 or len(output["data"]) != 2 * n:
        raise ValueError("predict_proba of two classes has two columns")
    return list(output["data"][1::2])


def _build_features(rows: Rows) -> Any:
    return {"features": rows}


def _read_probability(answer: Any) -> list[float]:
    return list(answer["probability"])


PEERS = (
    Peer("mlserver", ("mlserver>=1.7,<2", "mlserver-sklearn>=1.7,<2"), "/v2/models/leads/infer",
         _build_tensor, _read_tensor),
    Peer("bentoml", ("bentoml>=1.4,<2",), "/predict", _build_features, list),
    Peer("litserve", ("litserve>=0.2,<0.3",), "/predict", _build_features, _read_probability),
    Peer("ray", ("ray[serve]>=2.50,<3",), "/", _build_features, _read_probability),
    Peer("mlflow", ("mlflow>=3.17,<4",), "/invocations",
         lambda rows: {"inputs": rows}, lambda answer: [second for _, second in answer["predictions"]]),
)  # fmt: skip
