"""Whole audits from S3 over a bare encoder loop."""

import os
import tempfile
import time

import ray
import torch
from pydantic import Field

from clipflow_ray.audit.run import audit
from clipflow_ray.config import AuditConfig
from clipflow_ray.data import resources
from clipflow_ray.demo import s3_server
from clipflow_ray.lab.benchmark.common import Benchmark, bare_loop, interleaved, jpegs
from clipflow_ray.model.checkpoint import load_checkpoint
from clipflow_ray.model.encoder import Encoder
from clipflow_ray.place import Place


class AuditBenchmark(Benchmark):
    """Audits over a bare encoder loop."""

    objects: int = Field(description="Objects of one audit.")


def audit_against_bare_encoder(objects: int, rounds: int) -> AuditBenchmark:
    """Whole audits from S3 over a bare loop `encoder(batch)` on ready tensors, with one thread for each core.

    The time of an audit includes listing, actor start, reading, decoding, scoring and the ledger, but not Ray's start.
    """
    config = AuditConfig(input=(), output="")
    checkpoint = load_checkpoint(config.checkpoint)
    bare = bare_loop(Encoder(checkpoint.encoder, checkpoint.segments))
    with s3_server() as bucket, tempfile.TemporaryDirectory() as folder:
        resources.connect()  # after the server: workers inherit the credentials that it sets
        torch.set_num_threads(resources.cores())
        source = _fill(bucket, objects)

        def one_audit(at: int) -> float:
            start = time.perf_counter()
            changes = {"input": (source,), "output": os.path.join(folder, str(at)), "s3": bucket.options}
            audit(config.model_copy(update=changes))
            return objects / (time.perf_counter() - start)

        bare(0)
        result = interleaved("audit", one_audit, bare, rounds)
    ray.shutdown()
    return AuditBenchmark(**dict(result), objects=objects)


def _fill(bucket: Place, objects: int) -> str:
    """JPEGs in a bucket; returns the URI of their prefix."""
    images = bucket / "images/"
    for at, data in enumerate(jpegs(objects)):
        (images / f"{at:06d}.jpg").write(data)
    return images.uri
