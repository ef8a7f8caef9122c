"""A document may name only files, commands, flags and make targets that exist.

Checked is what stands in code: fenced blocks, `spans`, and the targets of links. Commands and flags come from the
command tree itself, so that no list of flags is kept here.
"""

import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from clipflow_ray.cli import app

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "clipflow_ray"
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), PACKAGE / "assets" / "default" / "MODEL_CARD.md")
)
# Folders of the repository: any path that begins with one of them must exist.
TOP = (".ci", "cluster", "clipflow_ray", "docs", "jobs", "serve_configs", "tests")
# Endings that name a file of the repository even without a folder. Other endings are those of data and results.
SOURCES = r"(?:py|md|sh|toml|lock|yaml|yml|conf)"
# Names with these endings that a user or a run makes.
MADE_BY_USERS = {"audit.yaml", "ideas.yaml", "report.md", "tower.yaml"}

Command = Any  # typer carries a click of its own, which has no public name


@cache
def files() -> frozenset[str]:
    """Names, without folders, of the files of the repository."""
    inside = (path.name for top in TOP for path in (ROOT / top).rglob("*") if path.is_file())
    return frozenset({*inside, *(path.name for path in ROOT.iterdir() if path.is_file())})


@cache
def make_names() -> frozenset[str]:
    """Targets and variables of the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return frozenset(re.findall(r"^([\w-]+)(?= *[?:]?=|:)", text, re.MULTILINE))


@cache
def command_line() -> Command:
    return typer.main.get_command(app)


@cache
def job(name: str) -> Command:
    """The command that `jobs/<name>.py` runs: one of its own, or the command line's of the same name."""
    text = (ROOT / "jobs" / f"{name}.py").read_text(encoding="utf-8")
    if f'main(["{name}"' in text:
        return command_line().commands[name]
    spec = importlib.util.spec_from_file_location(f"job_{name}", ROOT / "jobs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, "app"):
        return typer.main.get_command(module.app)
    single = typer.Typer()
    single.command()(module.main)
    return typer.main.get_command(single)


def flags(command: Command) -> set[str]:
    return {"--help", *(name for each in command.params for name in (*each.opts, *each.secondary_opts))}


@cache
def all_flags() -> frozenset[str]:
    """Flags of all commands and jobs: one that stands alone must be among them."""

    def below(command: Command) -> Iterator[str]:
        yield from flags(command)
        for child in getattr(command, "commands", {}).values():
            yield from below(child)

    jobs = (job(path.stem) for path in sorted((ROOT / "jobs").glob("*.py")))
    return frozenset(flag for command in (command_line(), *jobs) for flag in below(command))


def code_of(text: str) -> list[str]:
    """Lines of fenced blocks, continued lines joined, and inline spans."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*lines, *(span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", rest))]


def wrong_names(text: str, folder: Path) -> list[str]:
    """What `text`, a document in `folder`, names and is not there."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = target.partition("#")[0]
        if path and not re.match(r"[a-z]+:", path) and not (folder / path).exists():
            wrong.append(f"link {target}")
    for code in code_of(text):
        wrong += [f"file {name}" for name in paths_in(code) if not is_there(name)]
        wrong += wrong_commands(code)
    return wrong


def paths_in(code: str) -> Iterator[str]:
    """Words that look like paths of the repository."""
    for word in re.findall(r"[^\s\"',;()=|]+", code):
        name = word.rstrip(".:")
        if re.search(r"[<>{}$~]|://", name) or name.startswith(("/", "-", "../")):
            continue
        # `file.yaml::test` and `module:object` name things inside of a file
        name = name.partition(":")[0].removeprefix("./")
        in_top = name.startswith(tuple(f"{top}/" for top in TOP))
        if in_top or (re.fullmatch(rf"[\w./*-]+\.{SOURCES}", name) and name not in MADE_BY_USERS):
            yield name


def is_there(name: str) -> bool:
    """Whether a path exists from the root or the package, or a plain name anywhere in the repository."""
    if "/" not in name and "*" not in name:
        return name in files()
    return any(next(base.glob(name.rstrip("/")), None) is not None for base in (ROOT, PACKAGE))


def wrong_commands(code: str) -> list[str]:
    wrong = []
    for program in re.finditer(r"(?:clipflow-ray|python3? -m clipflow_ray)(?= |$)([^|&;#>`]*)", code):
        wrong += wrong_words(command_line(), "clipflow-ray", program[1].split())
    for script in re.finditer(r"python3? jobs/(\w+)\.py([^|&;#>`]*)", code):
        if (ROOT / "jobs" / f"{script[1]}.py").exists():  # else `paths_in` tells
            wrong += wrong_words(job(script[1]), script[1], script[2].split())
    for made in re.finditer(r"(?:^|\s)make((?: +[\w-]+(?:=\S*)?)+)", code):
        names = [word.partition("=")[0] for word in made[1].split()]
        wrong += [f"make {name}" for name in names if name not in make_names()]
    if code.startswith("--"):
        wrong += [f"flag {flag}" for flag in flags_in(code.split()) if flag not in all_flags()]
    return wrong


def wrong_words(command: Command, name: str, words: list[str]) -> list[str]:
    """Unknown subcommands and flags among the words that follow a command."""
    while words and (children := getattr(command, "commands", None)):
        if words[0] in children:
            command, name, words = children[words[0]], f"{name} {words[0]}", words[1:]
        elif words[0].startswith("-"):
            break
        else:
            return [f"command {name} {words[0]}"]
    return [f"flag {name} {flag}" for flag in flags_in(words) if flag not in flags(command)]


def flags_in(words: list[str]) -> list[str]:
    return [word.partition("=")[0].rstrip(".,:") for word in words if re.match(r"--[a-z]", word)]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_names_nothing_that_is_not_there(name: str) -> None:
    path = ROOT / name
    assert wrong_names(path.read_text(encoding="utf-8"), path.parent) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("Read [the limits](limitz.md).", "link limitz.md"),
        ("See `clipflow_ray/nowhere`.", "file clipflow_ray/nowhere"),
        ("See `model/nowhere.py`.", "file model/nowhere.py"),
        ("See `nowhere.py` and `errors.py`.", "file nowhere.py"),
        ("See `cluster/nowhere*.yaml`.", "file cluster/nowhere*.yaml"),
        ("```\ntests/\n  nowhere.py   what it tests\n```", "file nowhere.py"),
        ("Run `clipflow-ray audi --alpha 0.1`.", "command clipflow-ray audi"),
        ("Run `clipflow-ray audit --alhpa 0.1 --json`.", "flag clipflow-ray audit --alhpa"),
        ("Run `.venv/bin/clipflow-ray serve token old`.", "command clipflow-ray serve token old"),
        (
            "```\nclipflow-ray train --input photos/ \\\n  --gallery 3 | tee log\n```",
            "flag clipflow-ray train --gallery",
        ),
        ("Run `python -m clipflow_ray score --urls x`.", "flag clipflow-ray score --urls"),
        ("Run `python jobs/audit.py --inputs x`.", "flag audit --inputs"),
        ("Run `python jobs/benchmark.py pipelin`.", "command benchmark pipelin"),
        ("Run `python jobs/experiment.py --configs x`.", "flag experiment --configs"),
        ("Run `python jobs/nowhere.py --x`.", "file jobs/nowhere.py"),
        ("The flag `--galery 0` does it.", "flag --galery"),
        ("Run `make demos INPUT=x`.", "make demos"),
        ("Run `make demo INPUTS=x`.", "make INPUTS"),
    ],
)
def test_a_wrong_name_is_found(text: str, wrong: str) -> None:
    assert wrong_names(text, ROOT / "docs") == [wrong]


def test_names_that_are_there_and_names_of_others_pass() -> None:
    text = """
[README](../README.md#install), [elsewhere](https://example.com/x.md), [here](#method)
`clipflow_ray/model/flow.py`, `model/flow.py`, `errors.py`, `jobs/*.py`, `cluster/`, `clipflow_ray.serve.app:build_app`
`s3://bucket/a.yaml`, `runs/mine/checkpoint`, `~/.ray/x.yaml`, `report.html`, `ray start --num-cpus=4`, `--gallery 0`
`clipflow-ray`, `clipflow-ray --help`, `clipflow-ray serve token new`, `make demo INPUT=~/pictures`
```
ray job submit --working-dir . -- python jobs/audit.py --input s3://b/ --output s3://c/ --alpha 0.01
.venv/bin/clipflow-ray evaluate --natural a/ \\
  --generated b/ --output c/   # --no-such-flag
```
"""
    assert wrong_names(text, ROOT / "docs") == []


def test_both_packaged_checkpoints_have_the_same_card() -> None:
    first, second = ((PACKAGE / "assets" / name / "MODEL_CARD.md").read_text() for name in ("default", "fast"))
    assert first == second
