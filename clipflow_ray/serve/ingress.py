"""The deployment that clients reach: the HTTP interface around a Service whose detectors are another deployment."""

import asyncio
import json
import logging
from typing import Any, Final

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from clipflow_ray import compat
from clipflow_ray.config import ServeConfig
from clipflow_ray.images import Pixels
from clipflow_ray.serve.api import build_api
from clipflow_ray.serve.failures import RequestError
from clipflow_ray.serve.messages import Description, Detectors, Refused, Scored
from clipflow_ray.serve.service import Service, overloaded

_RETRY_SECONDS: Final = 0.1
_log = logging.getLogger("clipflow_ray.serve")


class Ingress:
    """One replica of the deployment, behind `serve.ingress`."""

    def __init__(self, config: ServeConfig, detector: DeploymentHandle[Any]) -> None:
        self.service = Service(config, RemoteDetectors(detector))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve's hook: the ASGI application of this replica."""
        return build_api(self.service)


class RemoteDetectors(Detectors):
    """Detectors that are replicas of another deployment, see `detector.DetectorReplica`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = compat.handle_of_cluster(handle)

    async def score(self, views: list[Pixels], alpha: float | None) -> Scored | Refused:
        """See `messages.Detectors.score`."""
        answer: Scored | Refused = await self._ask("score", views, alpha)
        return answer

    async def describe(self) -> Description:
        """See `messages.Detectors.describe`."""
        answer: Description = await self._ask("describe")
        return answer

    async def reproduces(self, view: Pixels) -> bool:
        """See `messages.Detectors.reproduces`."""
        answer: bool = await self._ask("reproduces", view)
        return answer

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """Call a detector. If it dies during the call, ask once more: another replica or its successor answers."""
        for last in (False, True):
            try:
                return await getattr(self._handle, method).remote(*arguments)
            except BackPressureError as error:
                raise overloaded() from error
            except (RayError, DeploymentUnavailableError) as error:
                _log.warning(json.dumps({"detector": method, "error": type(error).__name__, "last": last}))
                if last:
                    raise RequestError("not_ready", "No detector answers; try again after Retry-After.") from error
                await asyncio.sleep(_RETRY_SECONDS)
        raise AssertionError
