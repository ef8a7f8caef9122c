"""The command line, one file for each group of commands.

stdout carries data, stderr carries progress; exit codes are in `exits.py`. A command imports its heavy modules itself,
after it has checked its settings, so that `--help` and usage errors take no time.
"""

import logging
import signal
import sys
from typing import Annotated

import typer

from clipflow_ray import __version__
from clipflow_ray.cli import audit, calibrate, evaluate, machine, score, serve, train
from clipflow_ray.cli.exits import FAILED, WRONG_USAGE
from clipflow_ray.config import DISCLAIMER
from clipflow_ray.errors import ClipflowError, ConfigError

app = typer.Typer(
    name="clipflow-ray",
    help="Detects AI-generated images by anomaly detection. " + DISCLAIMER,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    audit.audit,
    audit.rescore,
    audit.finalize,
    score.score,
    train.train,
    calibrate.calibrate,
    evaluate.evaluate,
    train.proxies,
    machine.weights,
    machine.demo,
    machine.doctor,
):
    app.command()(command)
app.add_typer(serve.app, name="serve")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"clipflow-ray {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options that come before a command. The help text of the program is that of `app`."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code; a ClipflowError becomes one sentence on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr, datefmt="%H:%M:%S")
    for name in ("botocore", "boto3", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app(arguments, standalone_mode=True)
    except ClipflowError as error:
        print(f"error [{error.code}]: {error}", file=sys.stderr)
        sys.exit(WRONG_USAGE if isinstance(error, ConfigError) else FAILED)


def _terminated(*_: object) -> None:
    """Exit by SystemExit, so that every `finally` runs. Ray Data would print a ClipflowError with a traceback."""
    print(
        "error [terminated]: Stopped by SIGTERM. Finished work is kept; repeat the command to continue.",
        file=sys.stderr,
    )
    sys.exit(FAILED)
