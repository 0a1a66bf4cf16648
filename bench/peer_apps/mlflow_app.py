"""`mlflow models serve` on the model in MLflow's own format, one worker: `python mlflow_app.py MODEL PORT`.

Runs in the environment of MLflow and imports nothing of ours. Started by `bench.peer_servers`.
"""

import os
import sys
from pathlib import Path

import joblib
import mlflow.sklearn

if __name__ == "__main__":
    saved = Path.cwd() / "mlflow_model"
    mlflow.sklearn.save_model(
        joblib.load(sys.argv[1]), saved, pyfunc_predict_fn="predict_proba",
        pip_requirements=["scikit-learn"], skops_trusted_types=["sklearn.tree._tree.Tree"],
    )  # fmt: skip
    command = ["-m", "mlflow", "models", "serve", "--model-uri", str(saved), "--env-manager", "local"]
    options = ["--host", "127.0.0.1", "--port", sys.argv[2], "--workers", "1"]
    os.execv(sys.executable, [sys.executable, *command, *options])  # noqa: S606
