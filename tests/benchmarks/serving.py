"""How fast a registered model answers over loopback, beside what any answer costs there.

    python tests/benchmarks/serving.py [--config conf/flights.yaml] [--requests 300]

Serves the champion of the config by `lc-spark serve` and asks it for rows of the config's `raw`,
one request at a time on one connection. `ping` is MLflow's empty answer in the same minute: the
floor. `in process` calls the loaded model with the same rows as a DataFrame, without a server.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import requests

from lc_spark import config_file, registry, session, tables, tracking
from lc_spark.config import Config

BLOCKS = 5  # of requests of each kind in turn, so that a busy moment hits all kinds


def raw_rows(config: Config, columns: list[str], n: int) -> pd.DataFrame:
    """Return rows of raw as a client would send them: the columns that the model reads."""
    spark = session.start(config)
    raw_df = tables.read(spark, config, "raw").select(*[f"`{c}`" for c in columns])
    raw = raw_df.limit(n).toPandas()
    spark.stop()
    return raw


def serve(arguments: argparse.Namespace) -> tuple[subprocess.Popen[bytes], str]:
    """Start `lc-spark serve`, wait until it answers, and say how long that took."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from lc_spark.cli import main; main()", "serve"]
    command += [str(arguments.config), "--port", str(port)]
    command += ["--set", f"workspace={arguments.workspace}"] if arguments.workspace else []
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    address, started = f"http://127.0.0.1:{port}", time.perf_counter()
    while process.poll() is None:
        try:
            if requests.get(f"{address}/ping", timeout=5).ok:
                print(f"the server answered after {time.perf_counter() - started:.1f} s")
                return process, address
        except requests.ConnectionError:
            time.sleep(0.2)
    raise SystemExit("The server did not start: run 'lc-spark serve' by hand to see why.")


def measure(calls: dict[str, Callable[[], object]], n: int) -> dict[str, list[float]]:
    """Return the seconds of n calls of each kind, in BLOCKS that take turns, after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(20):
            call()
    for _ in range(BLOCKS):
        for name, call in calls.items():
            for _ in range(n // BLOCKS):
                started = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Parse, serve, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("conf/flights.yaml"))
    parser.add_argument("--workspace", default=None)
    parser.add_argument("--requests", type=int, default=300)
    arguments = parser.parse_args()
    overrides = [f"workspace={arguments.workspace}"] if arguments.workspace else []
    config = config_file.load(arguments.config, overrides)
    mlflow.set_tracking_uri(tracking.uri_of(config))
    uri = registry.version_of(config, f"models:/{config.model_name}@champion")
    model = mlflow.pyfunc.load_model(uri)
    columns = list(model.metadata.metadata["raw_columns"])
    rows = raw_rows(config, columns, 1000)
    process, address = serve(arguments)
    client = requests.Session()

    def ask(body: str) -> None:
        headers = {"Content-Type": "application/json"}
        answer = client.post(f"{address}/invocations", data=body, headers=headers)
        answer.raise_for_status()

    calls: dict[str, Callable[[], object]] = {"ping": partial(client.get, f"{address}/ping")}
    sizes = {"ping": 0}
    for n in (1, 100, 1000):
        few = rows[:n]
        split = {"dataframe_split": json.loads(few.to_json(orient="split", index=False))}
        calls[f"{n} rows, served"] = partial(ask, json.dumps(split))
        calls[f"{n} rows, in process"] = partial(model.predict, few)
        sizes |= {f"{n} rows, served": n, f"{n} rows, in process": n}
    try:
        seconds = measure(calls, arguments.requests)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
    load = os.getloadavg()[0]
    print(f"{uri}: {len(columns)} raw columns; load {load:.1f}")
    print("| request | p50 ms | p99 ms | rows/s |")
    print("|---|---|---|---|")
    for name, taken in seconds.items():
        p50, p99 = np.percentile(taken, [50, 99])
        rate = f"{sizes[name] / p50:,.0f}" if sizes[name] else "–"
        print(f"| {name} | {p50 * 1e3:.1f} | {p99 * 1e3:.1f} | {rate} |")


if __name__ == "__main__":
    main()
