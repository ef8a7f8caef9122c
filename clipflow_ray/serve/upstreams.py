"""Whom the edge asks: the ingress replicas of this machine, and Serve's proxy where none of them can be reached.

A replica that answers HTTP itself spares each request the way through the proxy, and the body a copy by RPC. Serve has
replicas do so where its switches say so (see `launch.SWITCHES`); where they do not, only the proxy is asked.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import ray
from ray.exceptions import RayError
from ray.serve.context import _get_global_client

from clipflow_ray.serve.edge import edge

APPLICATION: Final = "clipflow"
_LOOK_SECONDS: Final = 1.0  # well within the time that a replica which is to stop still answers
_ANSWER_SECONDS: Final = 10.0


def upstreams(proxy: str) -> list[str]:
    """host:port of each of the application's ingress replicas on this machine, then `proxy`.

    Raises RayError where Serve does not answer.
    """
    client = _get_global_client()
    assert client is not None
    groups = ray.get(client._controller.get_target_groups.remote(APPLICATION), timeout=_ANSWER_SECONDS)
    here, host = ray.util.get_node_ip_address(), proxy.rpartition(":")[0]
    ports = {each.port for group in groups if group.protocol == "HTTP" for each in group.targets if each.ip == here}
    return [*sorted({f"{host}:{port}" for port in ports} - {proxy}), proxy]


@contextmanager
def edge_of_serve(listen: str, proxy: str, folder: str) -> Iterator[str]:
    """The edge on `listen` before Serve, whose proxy is at `proxy`; yields its URL. It follows replicas that change.

    Raises EdgeError where nginx does not start, and RayError where Serve does not answer.
    """
    known = upstreams(proxy)
    with edge(listen, known, folder) as front:
        left = threading.Event()

        def follow() -> None:
            current = known
            while not left.wait(_LOOK_SECONDS):
                try:
                    found = upstreams(proxy)
                except RayError:  # a controller that is being replaced; until then nginx itself turns to the proxy
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
