"""`python jobs/benchmark.py audit|pipeline|sandbox|serve|listing|proxies`: ratios of one run, JSON on the last line."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Annotated

import typer

from clipflow_ray.lab.benchmark.audit import audit_against_bare_encoder
from clipflow_ray.lab.benchmark.common import Benchmark
from clipflow_ray.lab.benchmark.listing import listing as long_list
from clipflow_ray.lab.benchmark.pipeline import pipeline_against_plain_loops
from clipflow_ray.lab.benchmark.proxies import slowest_proxy_family
from clipflow_ray.lab.benchmark.sandbox import sandboxed_decoding
from clipflow_ray.lab.benchmark.serve import serving

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
Rounds = Annotated[int, typer.Option(min=5, help="Interleaved rounds; the median counts.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the JSON line alone.")]


@app.command()
def audit(objects: int = 512, rounds: Rounds = 5, as_json: AsJson = False) -> None:
    """Whole audits from S3 over a bare encoder loop."""
    _print(lambda: audit_against_bare_encoder(objects, rounds), as_json)


@app.command()
def pipeline(objects: int = 8192, rounds: Rounds = 5, as_json: AsJson = False) -> None:
    """Reading, decoding and scoring with the test tower over plain loops of Pillow and open_clip."""
    _print(lambda: pipeline_against_plain_loops(objects, rounds), as_json)


@app.command()
def sandbox(rounds: Rounds = 41, as_json: AsJson = False) -> None:
    """Decoding in the killable child process over decoding in place."""
    _print(lambda: sandboxed_decoding(rounds), as_json)


@app.command()
def serve(images: int = 128, rounds: Rounds = 5, as_json: AsJson = False) -> None:
    """The endpoint at saturation over a bare encoder loop, and what HTTP adds to the time of one image."""
    _print(lambda: serving(images, rounds), as_json)


@app.command()
def listing(keys: int = 1_000_000, rounds: Rounds = 5, as_json: AsJson = False) -> None:
    """Keys per second of a long list over those of an eighth of it, and the driver's peak memory."""
    _print(lambda: long_list(keys, rounds), as_json)


@app.command()
def proxies(rounds: Rounds = 5, as_json: AsJson = False) -> None:
    """The slowest proxy family on one core over the rate that training asks for."""
    _print(lambda: slowest_proxy_family(rounds), as_json)


def _print(benchmarked: Callable[[], Benchmark], as_json: bool) -> None:
    with redirect_stdout(sys.stderr):  # Ray prints what it has to say while it works
        result = benchmarked()
    if not as_json:
        print(f"{result.name}: ratio {result.ratio:.3f}, median of {result.n}, spread {list(result.spread)}")
    print(result.model_dump_json())


if __name__ == "__main__":
    app()
