"""`python jobs/autoencoders.py --config FILE --input DIR --output DIR`: fit the auto-encoders of the proxies."""

import logging
from typing import Annotated

import typer

from clipflow_ray.config import TrainConfig, load_yaml
from clipflow_ray.lab.autoencoders import make


def main(
    inputs: Annotated[list[str], typer.Option("--input", help="Natural images, as for training.")],
    output: Annotated[str, typer.Option("--output", help="Local folder for three .safetensors files.")],
    config: Annotated[
        str | None, typer.Option("--config", help="Training config; sources that its split reserves are skipped.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps per auto-encoder.")] = 3000,
) -> None:
    """Fit the auto-encoders on the natural images that train a flow. Each takes some minutes."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    count = make(load_yaml(TrainConfig, config, {"input": tuple(inputs), "output": output}), steps)
    print(f"{output}: fitted on {count} images")


if __name__ == "__main__":
    typer.run(main)
