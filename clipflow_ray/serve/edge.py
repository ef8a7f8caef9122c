"""The reverse proxy in front of Serve: nginx with `nginx.conf`, as a child of this process.

Serve's own proxy must not be reachable by the public: it buffers bodies without limit, lets clients switch its
timeouts off and fails on headers that are not UTF-8. `serve_configs/edge/nginx.conf` is a link to the file beside this
one.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from clipflow_ray.errors import EdgeError

CONFIG: Final = Path(__file__).parent / "nginx.conf"
_LISTEN: Final = "127.0.0.1:8000"
_UPSTREAM: Final = "127.0.0.1:8001"
_TRANSLATION: Final = "127.0.0.1:8002"
_START_SECONDS: Final = 10.0
_DRAIN_SECONDS: Final = 20.0


def nginx_path() -> str | None:
    """Path of the nginx program, or None. Debian installs it in a folder that is not on every user's PATH."""
    return shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


class Edge:
    """A running nginx in front of `upstreams`, as `point_to` takes them; `url` is the address for clients.

    Raises EdgeError with the last line of nginx's log if nginx does not start.
    """

    def __init__(self, program: str, listen: str, upstreams: Sequence[str], home: Path) -> None:
        self.url = f"http://{listen}"
        self._listen = listen
        self._home = home
        self._translation = f"127.0.0.1:{_free_port()}"
        self._configure(upstreams)
        command = [program, "-p", "./", "-c", "nginx.conf", "-e", "stderr", "-g", "daemon off;"]
        with (home / "access.log").open("ab") as access, (home / "error.log").open("ab") as errors:
            self._process = subprocess.Popen(
                command, cwd=home, stdin=subprocess.DEVNULL, stdout=access, stderr=errors, start_new_session=True
            )
        try:
            _wait_for(self._process, listen, home)
        except EdgeError:
            self.stop()
            raise

    def point_to(self, upstreams: Sequence[str]) -> None:
        """Send requests to these servers, each host:port, and to the last one only if no other can be reached.

        A request that has been forwarded is finished by the server that has it.
        """
        self._configure(upstreams)
        self._process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        """Let nginx finish the requests that it has, for at most 20 seconds, and end it."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            try:
                self._process.wait(_DRAIN_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.terminate()
                self._process.wait()

    def _configure(self, upstreams: Sequence[str]) -> None:
        text = rendered(self._listen, upstreams, self._translation)
        (self._home / "nginx.conf").write_text(text, encoding="utf-8")


@contextmanager
def edge(listen: str, upstreams: Sequence[str], folder: str) -> Iterator[Edge]:
    """Run the edge on `listen` (host:port) in front of `upstreams`, as `Edge.point_to` takes them.

    `folder` is created if it is missing. It holds the rendered configuration, buffered bodies, `access.log` (json) and
    `error.log`. On exit nginx finishes its requests. Raises EdgeError if nginx is missing or does not start.
    """
    program = nginx_path()
    if program is None:
        raise EdgeError("nginx is not installed: `apt-get install nginx`, or use Serve itself on loopback.")
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        # nginx's workers run as another user than root, who must be able to enter this folder.
        home.chmod(home.stat().st_mode | 0o011)
    made = Edge(program, listen, upstreams, home)
    try:
        yield made
    finally:
        made.stop()


def rendered(listen: str, upstreams: Sequence[str], translation: str) -> str:
    """The packaged configuration for other addresses, each host:port. The last upstream backs the others up."""
    *first, last = upstreams
    servers = [f"server {each};" for each in first] + [f"server {last} backup;" if first else f"server {last};"]
    text = CONFIG.read_text(encoding="utf-8")
    addresses = {
        f"server {_UPSTREAM};": "\n        ".join(servers),
        _UPSTREAM: last,
        _LISTEN: listen,
        _TRANSLATION: translation,
    }
    return "\n".join(_replaced(line, addresses) for line in text.splitlines()) + "\n"


def _replaced(line: str, addresses: dict[str, str]) -> str:
    for old, new in addresses.items():
        if old in line:
            return line.replace(old, new)
    return line


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for(process: "subprocess.Popen[bytes]", listen: str, home: Path) -> None:
    """Wait for the pid file, which nginx writes once it listens."""
    deadline = time.monotonic() + _START_SECONDS
    pid = home / "nginx.pid"
    while time.monotonic() < deadline and process.poll() is None:
        if pid.exists() and pid.read_text().strip() == str(process.pid):
            return
        time.sleep(0.02)
    said = (home / "error.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise EdgeError(f"nginx does not start on {listen}: {said[-1] if said else 'its log is empty'}")
