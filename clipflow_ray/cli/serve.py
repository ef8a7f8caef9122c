"""`serve` and its tokens."""

import sys
from typing import Annotated

import typer

from clipflow_ray.cli.options import (
    Alpha,
    Checkpoint,
    ConfigFile,
    MaxBytes,
    MaxPixels,
    MaxSeconds,
    MaxSide,
    MinSide,
    Precision,
    limit_options,
)
from clipflow_ray.config import ServeConfig, load_yaml

app = typer.Typer(help="Serve the detector over HTTP, with a web page.", invoke_without_command=True)
token_app = typer.Typer(help="Make bearer tokens for the server.", no_args_is_help=True)
app.add_typer(token_app, name="token")


@app.callback()
def serve(
    context: typer.Context,
    checkpoint: Checkpoint = None,
    precision: Precision = None,
    alpha: Alpha = None,
    config: ConfigFile = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port. The next port is used too, on loopback only.")] = 8000,
    max_pixels: MaxPixels = None,
    max_side: MaxSide = None,
    min_side: MinSide = None,
    max_bytes: MaxBytes = None,
    max_seconds: MaxSeconds = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="File with the hashes of accepted tokens; default: no token needed.")
    ] = None,
) -> None:
    """Serve over HTTP until stopped, then finish the requests in progress. Prints the URL."""
    if context.invoked_subcommand:
        return
    from clipflow_ray.serve.tokens import read_hashes

    hashes = read_hashes(tokens) if tokens else ()
    limits = limit_options(max_pixels, max_side, min_side, max_bytes, max_seconds)
    flags = {"checkpoint": checkpoint, "precision": precision, "alpha": alpha, "tokens": hashes, "limits": limits}
    settings = load_yaml(ServeConfig, config, flags)
    from clipflow_ray.serve.launch import run

    run(settings, host, port)


@token_app.command("new")
def new_token() -> None:
    """Make a token. Prints two lines: the token, which is stored nowhere, and its hash for the tokens file."""
    from clipflow_ray.serve.tokens import new_token as make

    token, digest = make()
    print(f"{token}\n{digest}")
    print("First line: give it to the client. Second line: append it to the file of `serve --tokens`.", file=sys.stderr)
