"""MLServer with its own scikit-learn runtime, in process: `python mlserver_app.py MODEL PORT`.

Without inference workers, metrics and debugging, which is the fastest it goes for one model on few cores.
Runs in the environment of MLServer and imports nothing of ours. Started by `bench.peer_servers`.
"""

import asyncio
import sys

from mlserver import MLServer, ModelSettings, Settings
from mlserver.settings import ModelParameters
from mlserver_sklearn import SKLearnModel


async def serve(model: str, port: int) -> None:
    """Serves the model until SIGTERM."""
    settings = Settings(
        host="127.0.0.1",
        http_port=port,
        grpc_port=0,
        parallel_workers=0,
        debug=False,
        metrics_endpoint=None,
    )
    parameters = ModelParameters(uri=model)
    await MLServer(settings).start(
        [ModelSettings(name="leads", implementation=SKLearnModel, parameters=parameters)]
    )


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
