"""`python cluster/render.py`: write the KubeRay files of this folder. All of them use the pods in base.yaml."""

from pathlib import Path
from typing import Any, Final

import ray
import yaml

from clipflow_ray import __version__

HERE: Final = Path(__file__).parent
_IMAGE: Final = f"registry.example.com/clipflow-ray:{__version__}"
_TOKEN: Final = """\
# Needs the KubeRay operator 1.4 or later and a secret: kubectl create secret generic clipflow-ray-token \\
#   --from-literal=token=$(openssl rand -hex 32)
"""
_SECRETS: Final = """\
# Secrets: clipflow-ray-token (token) and clipflow-ray-s3 (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL).
"""
_RENDERED: Final = "# Written by `make cluster`. Change cluster/base.yaml or cluster/render.py instead of this file.\n"


def documents() -> dict[str, str]:
    """File name -> text of each KubeRay file."""
    base = yaml.safe_load((HERE / "base.yaml").read_text(encoding="utf-8"))
    serve_config = (HERE.parent / "serve_configs" / "cluster.yaml").read_text(encoding="utf-8")
    standing = _cluster(base, gpu=(0, 0), cpu=(1, 0), standing=True)
    service = _cluster(base, gpu=(0, 0), cpu=(1, 0), standing=True, env=base["serve_env"])
    audit = "python jobs/audit.py --input s3://BUCKET/images/ --output s3://BUCKET/audits/1/ --alpha 0.01"
    train = "python jobs/train.py --input s3://BUCKET/photographs/ --output s3://BUCKET/training/1/ --workers 2"
    return {
        "raycluster.yaml": _document(
            "# A standing cluster: a head that runs no work, CPU workers that read and decode, GPU workers that\n"
            "# encode.\n" + _TOKEN,
            "RayCluster",
            "clipflow",
            standing,
        ),
        "rayjob-audit.yaml": _document(
            "# One audit on a cluster of its own. A retried job continues the audit of the last attempt.\n" + _SECRETS,
            "RayJob",
            "clipflow-audit",
            _job(audit, _cluster(base, gpu=(1, 1), cpu=(1, 1), s3=True)),
        ),
        "rayjob-train.yaml": _document(
            "# One training run on a cluster of its own: two workers, one GPU each.\n" + _SECRETS,
            "RayJob",
            "clipflow-train",
            _job(train, _cluster(base, gpu=(2, 2), cpu=(1, 1), s3=True)),
        ),
        "rayservice.yaml": _document(
            "# The endpoint on a cluster of its own: ingress replicas on CPU workers, detectors on GPU workers, both\n"
            "# autoscaled. Put cluster/edge.yaml in front: nothing else may reach Serve's port. `serveConfigV2` is\n"
            "# serve_configs/cluster.yaml.\n" + _TOKEN,
            "RayService",
            "clipflow",
            {"serveConfigV2": serve_config, "rayClusterConfig": service},
        ),
    }


def _job(entrypoint: str, cluster: dict[str, Any]) -> dict[str, Any]:
    return {
        "entrypoint": entrypoint,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 3600,
        "backoffLimit": 2,
        "rayClusterSpec": cluster,
    }


def _cluster(
    base: dict[str, Any],
    gpu: tuple[int, int],
    cpu: tuple[int, int],
    standing: bool = False,
    env: list[dict[str, Any]] | None = None,
    s3: bool = False,
) -> dict[str, Any]:
    """A RayCluster's spec. `gpu` and `cpu` are the (replicas, minReplicas) of the two worker groups.

    The head of a `standing` cluster has open ports, and its idle workers are removed. `s3` adds the S3 secret to pods.
    """
    pods = {name: _pod(base, name, env or [], s3) for name in ("head", "cpu", "gpu")}
    spec: dict[str, Any] = {"rayVersion": ray.__version__, "enableInTreeAutoscaling": True}
    start = dict(base["head"]["rayStartParams"])
    if standing:
        spec["autoscalerOptions"] = {"idleTimeoutSeconds": 120}
        start["dashboard-host"] = "0.0.0.0"
        pods["head"]["containers"][0]["ports"] = [
            {"containerPort": 6379, "name": "gcs"},
            {"containerPort": 8265, "name": "dashboard"},
        ]
    spec["headGroupSpec"] = {"rayStartParams": start, "template": {"spec": pods["head"]}}
    spec["workerGroupSpecs"] = [
        {
            "groupName": name,
            "replicas": replicas,
            "minReplicas": fewest,
            "maxReplicas": most,
            "rayStartParams": base[name]["rayStartParams"],
            "template": {"spec": pods[name]},
        }
        for name, (replicas, fewest), most in (("cpu", cpu, 20), ("gpu", gpu, 8))
    ]
    return spec


def _pod(base: dict[str, Any], name: str, env: list[dict[str, Any]], s3: bool) -> dict[str, Any]:
    own = base[name]
    container = {"name": "ray", "image": _IMAGE + own["image"], "env": [*base["env"], *env]}
    if s3:
        container["envFrom"] = [{"secretRef": {"name": "clipflow-ray-s3"}}]
    container["resources"] = {"requests": own["resources"], "limits": own["resources"]}
    pod = {"securityContext": base["securityContext"], "containers": [container]}
    return pod | ({"tolerations": own["tolerations"]} if "tolerations" in own else {})


class _Dumper(yaml.SafeDumper):
    """Writes no anchors, because they are hard to read, and writes texts of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def _document(comment: str, kind: str, name: str, spec: dict[str, Any]) -> str:
    body = {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}
    return comment + _RENDERED + yaml.dump(body, Dumper=_Dumper, sort_keys=False, width=120)


if __name__ == "__main__":
    for file, text in documents().items():
        (HERE / file).write_text(text, encoding="utf-8")
