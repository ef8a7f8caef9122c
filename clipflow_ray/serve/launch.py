"""`clipflow-ray serve`: an embedded Ray, the application on loopback and the edge in front of it, until a signal."""

import ipaddress
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import ray
from ray import serve

from clipflow_ray.config import ServeConfig
from clipflow_ray.data import resources
from clipflow_ray.errors import ConfigError
from clipflow_ray.serve.app import build_app
from clipflow_ray.serve.edge import nginx_path
from clipflow_ray.serve.upstreams import APPLICATION, edge_of_serve
from clipflow_ray.serve.whole import CALLBACK

_LOOPBACK: Final = "127.0.0.1"
# Ray's own set for throughput: the edge asks replicas directly instead of Serve's proxy (see `upstreams`), and pixels
# reach the detector by gRPC (with Ray's token). A message has room for the pixels of a whole request, 150 kB an image.
# A replica that is to stop answers for three more seconds, in which the edge learns of it. An answer leaves in one
# write (see `whole`). Our logs stay in the workers' own files. Torch's threads sleep between tasks, because spinning
# threads would take time from decoding.
SWITCHES: Final = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**30),
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": CALLBACK,
    "RAY_SERVE_LOG_TO_STDERR": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
# After `timeout_seconds` the service ends a request with an error in its own format. Serve's timeout, which answers in
# plain text, must come later.
_SERVE_TIMEOUT_BEYOND: Final = 10.0


def check_address(host: str, tokens: tuple[str, ...]) -> None:
    """Raises ConfigError if others on a network could use the server without a token or reach Serve's own proxy."""
    if _is_loopback(host):
        return
    if not tokens:
        raise ConfigError(
            f"--host {host} opens the server to others: make a token with `clipflow-ray serve token new` and give its "
            "file with --tokens, or stay on 127.0.0.1."
        )
    if nginx_path() is None:
        raise ConfigError(
            f"--host {host} needs nginx in front, which is not installed: Serve's own proxy takes bodies of any size "
            "and lets clients switch its timeouts off. `apt-get install nginx`, or stay on 127.0.0.1."
        )


def run(config: ServeConfig, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests under way and return.

    Clients reach `host`:`port`. If nginx is installed, Serve itself listens on loopback at `port` + 1.
    """
    check_address(host, config.tokens)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with endpoint(config, host, port) as url:
        print(url, flush=True)
        _say(f"Page, API and /docs at {url}. Logs in {_logs()}. Stop with Ctrl-C.")
        if not config.tokens:
            _say("The server asks for no token: only this machine can reach it.")
        stopping.wait()
        _say("Finishing the requests under way.")


@contextmanager
def endpoint(config: ServeConfig, host: str, port: int) -> Iterator[str]:
    """Start an endpoint with a Ray of its own and yield its URL; on exit the requests under way are finished."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    with ExitStack() as stack:
        resources.connect()
        stack.callback(ray.shutdown)
        yield _start(config, host, port, stack)


def _start(config: ServeConfig, host: str, port: int, stack: ExitStack) -> str:
    behind = nginx_path() is not None
    upstream = (_LOOPBACK, port + 1) if behind else (host, port)
    options: dict[str, Any] = {
        "host": upstream[0],
        "port": upstream[1],
        "request_timeout_s": config.timeout_seconds + _SERVE_TIMEOUT_BEYOND,
    }
    serve.start(http_options=options)
    stack.callback(serve.shutdown)
    serve.run(build_app(_sized(config)), name=APPLICATION, route_prefix="/")
    if not behind:
        _say("nginx is not installed: clients reach Serve itself, without the edge's limits.")
        return f"http://{host}:{port}"
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="clipflow-edge-"))
    return stack.enter_context(edge_of_serve(f"{host}:{port}", f"{upstream[0]}:{upstream[1]}", folder))


def _sized(config: ServeConfig) -> ServeConfig:
    """`config` with this machine's GPU for the detector if there is one, else with a thread per core."""
    gpu = 1.0 if ray.cluster_resources().get("GPU", 0.0) >= 1.0 else 0.0
    return config.model_copy(update={"detector_gpus": gpu, "detector_cpus": 1.0 if gpu else float(resources.cores())})


def _logs() -> Path:
    return Path(tempfile.gettempdir()) / "ray" / ray.get_runtime_context().get_session_name() / "logs"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
