"""How `make bench-peers` asks each peer and reads its answer; no peer is installed here."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench.load import Sample
from bench.peer_protocols import PEERS, Peer
from bench.peer_servers import PeerFailedError, install_peer, start_peer
from bench.peers import CELLS, PeerBench, build_figures
from bench.servers import ROOT

ROWS = [[0.1, 2.0], [1 / 3, -4.5]]
BY_NAME = {peer.name: peer for peer in PEERS}
BODIES = {
    "mlserver": {
        "inputs": [
            {"name": "features", "datatype": "FP64", "shape": [2, 2], "data": [0.1, 2.0, 1 / 3, -4.5]}
        ],
        "outputs": [{"name": "predict_proba"}],
    },
    "bentoml": {"features": ROWS},
    "litserve": {"features": ROWS},
    "ray": {"features": ROWS},
    "mlflow": {"inputs": ROWS},
}
ANSWERS = {
    "mlserver": {"outputs": [{"name": "predict_proba", "shape": [2, 2], "data": [0.75, 0.25, 0.4, 0.6]}]},
    "bentoml": [0.25, 0.6],
    "litserve": {"probability": [0.25, 0.6]},
    "ray": {"probability": [0.25, 0.6]},
    "mlflow": {"predictions": [[0.75, 0.25], [0.4, 0.6]]},
}


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_request_carries_every_feature_to_the_last_bit(peer: Peer) -> None:
    assert json.loads(peer.encode(ROWS)) == BODIES[peer.name]


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_an_answer_reads_as_the_probability_of_the_second_class(peer: Peer) -> None:
    assert peer.decode(json.dumps(ANSWERS[peer.name]).encode()) == [0.25, 0.6]


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_what_is_no_answer_is_not_read_as_one(peer: Peer) -> None:
    with pytest.raises((LookupError, TypeError, ValueError)):
        peer.decode(b'{"error": "loading"}' if peer.name != "bentoml" else b"loading")


def test_predicted_classes_are_not_taken_for_probabilities() -> None:
    classes = {"outputs": [{"name": "predict", "shape": [2, 1], "data": [0, 1]}]}
    with pytest.raises(ValueError, match="two columns"):
        BY_NAME["mlserver"].decode(json.dumps(classes).encode())


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_each_peer_has_an_application_that_imports_nothing_of_ours(peer: Peer) -> None:
    source = (ROOT / "bench" / "peer_apps" / f"{peer.name}_app.py").read_text()
    assert "import app" not in source
    assert "from app" not in source
    assert "from bench" not in source


def test_a_peer_that_does_not_install_says_why(tmp_path: Path) -> None:
    peer = Peer("nothing", ("not a requirement",), "/", lambda rows: rows, list)
    with pytest.raises(PeerFailedError, match=r"does not install: .*not a requirement"):
        install_peer(peer, tmp_path / "peer")


def test_a_peer_that_does_not_start_says_why(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such model\nexit 1\n")
    python.chmod(0o755)
    with (
        pytest.raises(PeerFailedError, match="does not start: no such model"),
        start_peer(BY_NAME["ray"], python, tmp_path / "model.joblib", ROWS),
    ):
        pass


def test_figures_compare_latency_at_one_connection_and_the_best_rate_of_many() -> None:
    bench = PeerBench({}, [], np.empty((0, 2)))
    for size, connections in CELLS:
        bench.samples["cold", size, connections] = Sample([2.0], seconds=1.0)
        bench.samples["ray", size, connections] = Sample([8.0], seconds=2.0 if connections == 8 else 4.0)
    reached = [(figure.reached, figure.holds) for figure in build_figures(bench, ["ray"])]
    assert reached == [(0.25, True), (4.0, True), (0.25, True), (2.0, True)]
