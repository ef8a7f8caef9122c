"""The import rules: which module may import which, and which may use private names of other packages."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "clipflow_ray"
# Lowest floor first: a file imports only from its own floor or from floors before it. docs/architecture.md shows them.
FLOORS = (
    ("__init__", "errors"),
    ("config",),
    ("statistics", "columns", "compat"),
    ("place",),
    ("recognise",),
    ("containers", "images", "pictures"),
    ("sandbox",),
    ("proxies",),
    ("model",),
    ("runs", "inputs"),
    ("data",),
    ("reports",),
    ("audit", "train", "evaluate", "serve"),
    ("client", "ray"),
    ("calibrate", "demo", "doctor"),
    ("cli",),
    ("lab",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
JOURNEYS = {"audit", "train", "evaluate", "serve"}


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)] = path
    return names


MODULES = modules()


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, type checking included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            # `from clipflow_ray.data import resources` names a module, `from clipflow_ray.errors import X` does not.
            below = {f"{node.module}.{name.name}" for name in node.names}
            found |= below & MODULES.keys() or {node.module}
    return {
        "clipflow_ray.__init__" if name == "clipflow_ray" else name for name in found if name.startswith("clipflow_ray")
    }


IMPORTS = {name: imported(path) - {name} for name, path in MODULES.items()}


# The package itself hands on the detector, but imports it only when somebody asks for the name.
del IMPORTS["clipflow_ray.__init__"]


def room(module: str) -> str:
    return module.split(".")[1]


def floor(module: str) -> int:
    # The registry of input formats holds names and imports nothing, so that settings may know them.
    return 0 if module == "clipflow_ray.inputs.registry" else FLOOR[room(module)]


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in MODULES} == FLOOR.keys()


def test_a_file_imports_only_from_its_own_floor_or_from_lower_ones() -> None:
    pairs = [(name, other) for name, others in IMPORTS.items() for other in others]
    assert not [f"{name} imports {other}" for name, other in pairs if floor(other) > floor(name)]


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_journeys_know_nothing_of_each_other_but_evaluation_may_run_an_audit() -> None:
    crossed = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if {room(name), room(other)} <= JOURNEYS
        and room(name) != room(other)
        and (room(name), room(other)) != ("evaluate", "audit")
    ]
    assert not crossed


def loaded_by(module: str) -> set[str]:
    """Top-level packages that a fresh process has loaded after it imported `module`."""
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_model_is_imported_without_ray() -> None:
    names = " ,".join(name for name in MODULES if room(name) == "model")
    loaded = loaded_by(names)
    assert "torch" in loaded and "ray" not in loaded


@pytest.mark.parametrize("module", ["clipflow_ray.client", "clipflow_ray.cli"])
def test_the_client_and_the_command_line_start_without_torch_and_ray(module: str) -> None:
    assert not {"torch", "ray"} & loaded_by(module)


def test_tasks_that_read_and_decode_start_without_torch() -> None:
    assert "torch" not in loaded_by("clipflow_ray.data.reading, clipflow_ray.train.views")


def sources() -> Iterator[tuple[Path, ast.AST]]:
    for folder in ("clipflow_ray", "jobs", "tests", "cluster"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                yield path.relative_to(ROOT), node


def private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def test_private_names_of_other_packages_stand_in_compat_alone() -> None:
    found = []
    for path, node in sources():
        if path.name == "compat.py":
            continue
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(("clipflow_ray", "tests")):
            names = [node.module, *(name.name for name in node.names)]
            found += [f"{path}:{node.lineno} {name}" for name in names if private(name)]
        elif isinstance(node, ast.Attribute) and private(node.attr) and path.parts[0] != "tests":
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not own and ast.unparse(node) != "os._exit":  # a documented function in spite of its name
                found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
    assert not found


def test_s3_options_stand_in_place_and_config_alone() -> None:
    name = "S3" + "Options"  # in two parts, so that the search does not find this file
    named = subprocess.run(["git", "grep", "-l", name], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(named.stdout.split()) == {"clipflow_ray/place.py", "clipflow_ray/config.py"}
