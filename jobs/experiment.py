"""`python jobs/experiment.py --config FILE`: compare candidates on held-out proxy families; see `ExperimentConfig`."""

import logging
from typing import Annotated

import typer

from clipflow_ray.config import ExperimentConfig, load_yaml
from clipflow_ray.lab.experiment import experiment


def main(
    config: Annotated[str, typer.Option(help="YAML: `train` as for `clipflow-ray train`, `candidates`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print only the summary, as JSON.")] = False,
) -> None:
    """Fit every candidate with each proxy family held out in turn; writes results.parquet and experiment.html."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    result = experiment(load_yaml(ExperimentConfig, config, {}))
    if as_json:
        print(result.model_dump_json(exclude_unset=True))
        return
    for line in result.summary:
        told = line.failed or f"AUROC {line.auroc:.3f}, worst {line.worst} {line.worst_auroc:.3f}"
        print(f"{line.candidate}: {told}")
    print(f"{result.results}\n{result.page}")


if __name__ == "__main__":
    typer.run(main)
