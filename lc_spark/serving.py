"""Serves the champion: MLflow's own scoring server over HTTP, raw rows in and scores out."""

import logging
import os
import sys
from pathlib import Path

from lc_spark import registry, tracking
from lc_spark.config import Config

log = logging.getLogger(__name__)


def serve(config: Config, port: int) -> None:
    """Become `mlflow models serve` of the champion, on 127.0.0.1; does not return.

    It serves the version that is champion now. Raises LcSparkError when the port is taken or there
    is no champion.
    """
    tracking.check_port(port)
    model_uri = registry.version_of(config, f"models:/{config.model_name}@champion")
    log.info("%s answers at http://127.0.0.1:%d/invocations", model_uri, port)
    os.environ["MLFLOW_TRACKING_URI"] = tracking.uri_of(config)
    # It starts a program of the environment by name, whether that is activated or not.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", model_uri]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, command)
