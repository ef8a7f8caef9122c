"""`python jobs/benchmark.py NAME`: a ratio of two rates, and a JSON line. `--help` lists the names."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Annotated

import typer

from clipflow_ray.config import PrecisionChoice
from clipflow_ray.lab.benchmark.audit import audit_against_bare_encoder
from clipflow_ray.lab.benchmark.common import Benchmark
from clipflow_ray.lab.benchmark.decode import decoding_large_jpegs
from clipflow_ray.lab.benchmark.finalize import finalizing
from clipflow_ray.lab.benchmark.listing import listing as long_list
from clipflow_ray.lab.benchmark.pipeline import pipeline_against_plain_loops
from clipflow_ray.lab.benchmark.proxies import slowest_proxy_family
from clipflow_ray.lab.benchmark.rescore import rescoring
from clipflow_ray.lab.benchmark.sandbox import sandboxed_decoding
from clipflow_ray.lab.benchmark.serve import serving
from clipflow_ray.lab.benchmark.towers import encoders_of_recipes

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
Rounds = Annotated[int, typer.Option(min=5, help="Interleaved rounds; the ratio is the median over them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print only the JSON line.")]


@app.command()
def audit(objects: int = 512, rounds: Rounds = 5, precision: PrecisionChoice = "auto", as_json: AsJson = False) -> None:
    """Rate of whole audits from S3, relative to a bare encoder loop in float32; and that of a loop in bfloat16."""
    _print(lambda: audit_against_bare_encoder(objects, rounds, precision), as_json)


@app.command()
def pipeline(objects: int = 8192, rounds: Rounds = 5, as_json: AsJson = False) -> None:
    """Rate of reading, decoding and scoring with the test tower, relative to plain loops of Pillow and open_clip."""
    _print(lambda: pipeline_against_plain_loops(objects, rounds), as_json)


@app.command()
def sandbox(rounds: Rounds = 41, as_json: AsJson = False) -> None:
    """Rate of decoding in the sandbox process, relative to decoding in this process."""
    _print(lambda: sandboxed_decoding(rounds), as_json)


@app.command()
def decode(rounds: Rounds = 7, as_json: AsJson = False) -> None:
    """Rate of decoding large JPEGs to views in the sandbox, relative to plain Pillow."""
    _print(lambda: decoding_large_jpegs(rounds), as_json)


@app.command()
def serve(images: int = 128, rounds: Rounds = 5, as_json: AsJson = False) -> None:
    """Rate of the saturated endpoint, relative to a bare encoder loop; and the time that HTTP adds to one image."""
    _print(lambda: serving(images, rounds), as_json)


@app.command()
def listing(keys: int = 1_000_000, rounds: Rounds = 5, as_json: AsJson = False) -> None:
    """Rate of listing many keys, relative to an eighth of them; and the peak memory of the driver."""
    _print(lambda: long_list(keys, rounds), as_json)


@app.command()
def rescore(rows: int = 200_000, rounds: Rounds = 5, as_json: AsJson = False) -> None:
    """Rate of scoring kept embeddings, relative to a bare loop of the flow."""
    _print(lambda: rescoring(rows, rounds), as_json)


@app.command()
def finalize(rows: int = 1_000_000, rounds: Rounds = 5, as_json: AsJson = False) -> None:
    """Rate of ledger and report of many scores, relative to an eighth of them; peak memory and files."""
    _print(lambda: finalizing(rows, rounds), as_json)


@app.command()
def proxies(rounds: Rounds = 5, as_json: AsJson = False) -> None:
    """Rate of the slowest proxy family on one core, relative to the rate that training needs."""
    _print(lambda: slowest_proxy_family(rounds), as_json)


@app.command()
def towers(images: int = 2, rounds: Rounds = 5, as_json: AsJson = False) -> None:
    """Rate of each recipe's encoder, relative to that of the recipe `default`."""
    _print(lambda: encoders_of_recipes(images, rounds), as_json)


def _print(benchmarked: Callable[[], Benchmark], as_json: bool) -> None:
    with redirect_stdout(sys.stderr):  # Ray prints messages to stdout
        result = benchmarked()
    if not as_json:
        print(f"{result.name}: ratio {result.ratio:.3f}, median of {result.n}, spread {list(result.spread)}")
    print(result.model_dump_json())


if __name__ == "__main__":
    app()
