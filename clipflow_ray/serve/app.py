"""The Serve application: an ingress in front of detectors, each with its own replicas, queue and health check.

For `serve run` and `serve deploy` its import path is `clipflow_ray.serve.app:build_app`, and `args` are a ServeConfig.
"""

from typing import Any, Final

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig

from clipflow_ray.config import ServeConfig, Tuning, validated
from clipflow_ray.serve.detector import DetectorReplica
from clipflow_ray.serve.ingress import Ingress

# New replicas start before the old ones stop, so that an update refuses no request. The cluster needs room for both.
_SURGE_PERCENT: Final = 100
# Above `max_requests` the ingress refuses in the format of the interface. Serve, which sends only a status, must come
# later.
_HEADROOM: Final = 2


def build_app(args: ServeConfig | dict[str, Any]) -> serve.Application:
    """The application of these settings; raises ConfigError if they are wrong. Loads no model."""
    config = args if isinstance(args, ServeConfig) else validated(ServeConfig, args)
    tuning = config.model_dump(include=set(Tuning.model_fields))
    detector = serve.deployment(
        name="Detector",
        user_config=tuning,
        ray_actor_options={"num_cpus": config.detector_cpus, "num_gpus": config.detector_gpus},
        max_ongoing_requests=2 * config.max_batch_size,
        max_queued_requests=config.max_requests,
        autoscaling_config=_autoscaling(config.detector_replicas, config.max_batch_size),
        **_common(config),
    )(DetectorReplica)
    ingress = serve.deployment(
        name="Ingress",
        ray_actor_options={"num_cpus": config.ingress_cpus},
        max_ongoing_requests=_HEADROOM * config.max_requests,
        max_queued_requests=config.max_queued_requests,
        autoscaling_config=_autoscaling(config.ingress_replicas, config.max_requests / 2),
        **_common(config),
    )(serve.ingress()(Ingress))
    application: serve.Application = ingress.bind(config, detector.bind(config))
    return application


def _common(config: ServeConfig) -> dict[str, Any]:
    return {
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=config.retry_after_seconds),
        "graceful_shutdown_timeout_s": config.drain_seconds,
        "health_check_period_s": config.health_check_seconds,
        "max_surge_percent": _SURGE_PERCENT,
        "logging_config": LoggingConfig(enable_access_log=False),
    }


def _autoscaling(replicas: tuple[int, int], target: float) -> AutoscalingConfig:
    """`target` is the requests per replica that Serve aims at; below the batch size it scales before batches fill."""
    fewest, most = replicas
    return AutoscalingConfig(min_replicas=fewest, max_replicas=most, target_ongoing_requests=target)
