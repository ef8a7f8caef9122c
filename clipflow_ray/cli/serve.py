"""`serve` and its tokens."""

import sys
from typing import Annotated

import typer

from clipflow_ray.cli.options import Alpha, Checkpoint, ConfigFile
from clipflow_ray.config import ServeConfig, load_yaml

app = typer.Typer(help="Answer over HTTP, with a page for people.", invoke_without_command=True)
token_app = typer.Typer(help="Bearer tokens of the server.", no_args_is_help=True)
app.add_typer(token_app, name="token")


@app.callback()
def serve(
    context: typer.Context,
    checkpoint: Checkpoint = None,
    alpha: Alpha = None,
    config: ConfigFile = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; the next one is used too, on loopback.")] = 8000,
    tokens: Annotated[str | None, typer.Option("--tokens", help="File with the hashes of accepted tokens.")] = None,
) -> None:
    """Answer over HTTP until stopped, and then finish what is under way; prints its URL."""
    if context.invoked_subcommand:
        return
    from clipflow_ray.serve.tokens import read_hashes

    hashes = read_hashes(tokens) if tokens else ()
    settings = load_yaml(ServeConfig, config, {"checkpoint": checkpoint, "alpha": alpha, "tokens": hashes})
    from clipflow_ray.serve.launch import run

    run(settings, host, port)


@token_app.command("new")
def new_token() -> None:
    """Make a token: its two lines on stdout are the token, shown this once, and its hash for the tokens file."""
    from clipflow_ray.serve.tokens import new_token as make

    token, digest = make()
    print(f"{token}\n{digest}")
    print("First line: give it to the client. Second line: append it to the file of `serve --tokens`.", file=sys.stderr)
