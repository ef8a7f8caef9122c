"""Write the generated sections of `docs/formats.md` from the code: `python -m clipflow_ray.lab.formats`.

A generated section stands between `<!-- generated: NAME -->` and `<!-- end -->`; the rest of the document is written by
hand.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
from pydantic import BaseModel

from clipflow_ray import config, errors
from clipflow_ray.audit.record import AuditPlan, AuditRecord, AuditReport
from clipflow_ray.calibrate import CalibrationReport, EncodedRecord
from clipflow_ray.cli.exits import EXIT_CODES
from clipflow_ray.columns import COLUMNS, STATUSES
from clipflow_ray.errors import ITEM_CODES, ClipflowError
from clipflow_ray.evaluate.record import DistortionsRecord, EvaluationFigures, VariantsRecord
from clipflow_ray.model.calibration import REASONS, VERDICTS
from clipflow_ray.model.finding import WARNINGS
from clipflow_ray.model.record import CheckpointRecord
from clipflow_ray.serve import schemas
from clipflow_ray.serve.failures import CODES
from clipflow_ray.train.record import FeaturesRecord

DOCUMENT: Final = Path("docs/formats.md")
_MAX_VALUES: Final = 4  # longer lists of codes have a table of their own
_SECTION: Final = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(text: str) -> str:
    """Return `text` with its generated sections made from the code. Raises KeyError for an unknown section."""
    return _SECTION.sub(lambda found: f"{found[1]}\n{SECTIONS[found[2]]()}\n{found[3]}", text)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    lines = [list(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def model_tables(*models: type[BaseModel]) -> str:
    """Return a table of the JSON fields of each model and of each model nested in it, except configs."""
    schemas_by_name: dict[str, Any] = {}
    for model in models:
        schema = model.model_json_schema(mode="serialization")
        nested = schema.pop("$defs", {})
        schemas_by_name |= {model.__name__: schema} | {name: nested[name] for name in nested if not _is_config(name)}
    return "\n".join(_model_table(name, schema) for name, schema in schemas_by_name.items())


def _is_config(name: str) -> bool:
    kind = getattr(config, name, None)
    return isinstance(kind, type) and issubclass(kind, config.Config)


def _model_table(name: str, schema: dict[str, Any]) -> str:
    fields = schema["properties"].items()
    rows = ((f"`{field}`", json_type(about), about["description"]) for field, about in fields)
    return f"**{name}.** {schema['description']}\n\n{table(('field', 'type', 'meaning'), rows)}"


def json_type(schema: dict[str, Any]) -> str:
    """Return the JSON type that a JSON schema describes, in words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(json_type(each) for each in schema["anyOf"])
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if 0 < len(values) <= _MAX_VALUES:
        return " or ".join(f"`{value}`" for value in values)
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(json_type(each) for each in schema['prefixItems'])}]"
        return f"list of {json_type(schema['items'])}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {json_type(schema['additionalProperties'])}"
    return str(schema.get("type", "any"))


def _ledger() -> str:
    rows = ((f"`{c.name}`", _arrow(c.type), ", ".join(c.stages), c.meaning) for c in COLUMNS if c.dropped_by is None)
    return table(("column", "Arrow type", "produced by", "meaning"), rows)


def _manifest() -> str:
    rows = ((f"`{c.name}`", _arrow(c.type), c.meaning) for c in COLUMNS if "listing" in c.stages)
    return table(("column", "Arrow type", "meaning"), rows)


def _arrow(kind: pa.DataType) -> str:
    """The name of the function in pyarrow that makes the type."""
    return (
        f"list of {_arrow(kind.value_type)}"
        if pa.types.is_list(kind)
        else {"float": "float32"}.get(str(kind), str(kind))
    )


def _meanings(meanings: dict[Any, str], head: str) -> str:
    return table((head, "meaning"), ((f"`{name}`", meaning) for name, meaning in meanings.items()))


def _errors() -> str:
    def below(kind: type[ClipflowError]) -> Iterator[type[ClipflowError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from below(child)

    known = [k for k in below(ClipflowError) if k.__module__ == errors.__name__ and "code" in vars(k)]
    rows = ((f"`{kind.code}`", f"`{kind.__name__}`", (kind.__doc__ or "").splitlines()[0]) for kind in known)
    return table(("code", "exception", "meaning"), rows)


def _http(model: type[BaseModel]) -> str:
    """As `model_tables`, for JSON in which a field without a value is absent."""
    return model_tables(model).replace(" or null", ", or absent")


def _http_errors() -> str:
    rows = ((str(status), f"`{code}`", meaning) for code, (status, meaning) in CODES.items())
    return table(("status", "code", "meaning"), rows)


SECTIONS: Final[dict[str, Callable[[], str]]] = {
    "run-audit": lambda: model_tables(AuditRecord),
    "run-embeddings": lambda: model_tables(FeaturesRecord, VariantsRecord, DistortionsRecord, EncodedRecord),
    "report": lambda: model_tables(AuditReport),
    "checkpoint": lambda: model_tables(CheckpointRecord),
    "calibration": lambda: model_tables(CalibrationReport),
    "figures": lambda: model_tables(EvaluationFigures),
    "plan": lambda: model_tables(AuditPlan),
    "manifest": _manifest,
    "ledger": _ledger,
    "statuses": lambda: _meanings(STATUSES, "status"),
    "verdicts": lambda: _meanings(VERDICTS, "verdict"),
    "reasons": lambda: _meanings(REASONS, "reason"),
    "warnings": lambda: _meanings(WARNINGS, "warning"),
    "item-errors": lambda: _meanings(ITEM_CODES, "error_code"),
    "errors": _errors,
    "exit-codes": lambda: _meanings(EXIT_CODES, "exit code"),
    "http-request": lambda: _http(schemas.DetectRequest),
    "http-answer": lambda: _http(schemas.DetectResponse),
    "http-model": lambda: _http(schemas.ModelCard),
    "http-errors": lambda: _http(schemas.ErrorBody),
    "http-codes": _http_errors,
}


if __name__ == "__main__":
    DOCUMENT.write_text(rendered(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
