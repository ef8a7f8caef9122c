"""Whole audits from S3 over a bare encoder loop."""

import os
import tempfile
import time
from typing import get_args

import ray
import torch
from pydantic import Field

from clipflow_ray.audit.run import audit
from clipflow_ray.config import AuditConfig, Precision, PrecisionChoice
from clipflow_ray.data import resources
from clipflow_ray.demo import s3_server
from clipflow_ray.lab.benchmark.common import Benchmark, bare_loop, interleaved, jpegs
from clipflow_ray.model.checkpoint import load_checkpoint
from clipflow_ray.model.encoder import Encoder
from clipflow_ray.place import Place


class AuditBenchmark(Benchmark):
    """Audits over a bare encoder loop in float32."""

    objects: int = Field(description="Objects of one audit.")
    precision: Precision = Field(description="Precision of the audits' encoders.")
    bfloat16: Benchmark = Field(description="A bare loop of the encoder in bfloat16 over that in float32.")


def audit_against_bare_encoder(objects: int, rounds: int, precision: PrecisionChoice) -> AuditBenchmark:
    """Whole audits from S3 over a bare loop `encoder(batch)` on ready tensors in float32, with a thread for each core.

    The audits encode at `precision`. The same loop is measured in bfloat16 as well. The time of an audit includes
    listing, actor start, reading, decoding, scoring and the ledger, but not Ray's start.
    """
    config = AuditConfig(input=(), output="", precision=precision)
    checkpoint = load_checkpoint(config.checkpoint)
    chosen: set[Precision] = set()
    bare, half = (
        bare_loop(Encoder(checkpoint.encoder.model_copy(update={"precision": each}), checkpoint.segments))
        for each in get_args(Precision)
    )
    with s3_server() as bucket, tempfile.TemporaryDirectory() as folder:
        resources.connect()  # after the server: workers inherit the credentials that it sets
        torch.set_num_threads(resources.cores())
        source = _fill(bucket, objects)

        def one_audit(at: int) -> float:
            start = time.perf_counter()
            changes = {"input": (source,), "output": os.path.join(folder, str(at)), "s3": bucket.options}
            chosen.add(audit(config.model_copy(update=changes)).identity.precision)
            return objects / (time.perf_counter() - start)

        bare(0)
        half(0)
        bfloat16 = interleaved("bfloat16", half, bare, rounds)
        result = interleaved("audit", one_audit, bare, rounds)
    ray.shutdown()
    (used,) = chosen
    return AuditBenchmark(**dict(result), objects=objects, precision=used, bfloat16=bfloat16)


def _fill(bucket: Place, objects: int) -> str:
    """JPEGs in a bucket; returns the URI of their prefix."""
    images = bucket / "images/"
    for at, data in enumerate(jpegs(objects)):
        (images / f"{at:06d}.jpg").write(data)
    return images.uri
