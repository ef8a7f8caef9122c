"""The servers that the edge asks: the ingress replicas of this machine, and Serve's proxy if no replica can be reached.

A request that goes straight to a replica is not copied through the proxy. Replicas answer HTTP themselves if Serve's
switches say so (see `launch.SWITCHES`). Without the switches only the proxy is asked.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import ray
from ray.exceptions import RayError

from clipflow_ray import compat
from clipflow_ray.serve.edge import edge

APPLICATION: Final = "clipflow"
_LOOK_SECONDS: Final = 1.0  # a replica that is to stop answers for longer than this
_ANSWER_SECONDS: Final = 10.0


def upstreams(proxy: str) -> list[str]:
    """host:port of each of the application's ingress replicas on this machine, then `proxy`.

    Raises RayError if Serve does not answer.
    """
    here, host = ray.util.get_node_ip_address(), proxy.rpartition(":")[0]
    ports = {port for ip, port in compat.ingress_addresses(APPLICATION, _ANSWER_SECONDS) if ip == here}
    return [*sorted({f"{host}:{port}" for port in ports} - {proxy}), proxy]


@contextmanager
def edge_of_serve(listen: str, proxy: str, folder: str) -> Iterator[str]:
    """Run the edge on `listen` in front of Serve, whose proxy is at `proxy`; yields the URL of the edge.

    The edge learns of replicas that come and go. Raises EdgeError if nginx does not start, and RayError if Serve does
    not answer.
    """
    known = upstreams(proxy)
    with edge(listen, known, folder) as front:
        left = threading.Event()

        def follow() -> None:
            current = known
            while not left.wait(_LOOK_SECONDS):
                try:
                    found = upstreams(proxy)
                except RayError:  # the controller is being replaced; until it is back, nginx falls back to the proxy
                    continue
                if found != current:
                    front.point_to(found)
                    current = found

        follower = threading.Thread(target=follow, name="upstreams", daemon=True)
        follower.start()
        try:
            yield front.url
        finally:
            left.set()
            follower.join()
