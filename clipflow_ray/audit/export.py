"""The ledger as one csv file, for people and programs that read no parquet."""

import io
from typing import Final, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from clipflow_ray.audit.ledger import LEDGER
from clipflow_ray.columns import LEDGER_SCHEMA
from clipflow_ray.runs.folder import Run

_NAMES: Final = {"csv": "flagged.csv", "csv-all": "ledger.csv"}
_LISTS: Final = tuple(field.name for field in LEDGER_SCHEMA if pa.types.is_list(field.type))


def export_csv(run: Run, rows: Literal["none", "csv", "csv-all"]) -> str | None:
    """Write the flagged rows of the ledger, or all of them, beside it, and return the URI of the file.

    The columns are those of the ledger, in UTF-8; the entries of a list are separated by `;`. With `none`, nothing is
    written.
    """
    if rows == "none":
        return None
    flagged = pc.field("verdict") == "likely_ai" if rows == "csv" else None
    schema = pa.schema([(f.name, pa.string() if f.name in _LISTS else f.type) for f in LEDGER_SCHEMA])
    sink = io.BytesIO()
    with pacsv.CSVWriter(sink, schema) as writer:
        for part in run.parts(LEDGER):
            for batch in part.to_batches(columns=LEDGER_SCHEMA.names, filter=flagged):
                columns = [pc.binary_join(batch[name], ";") if name in _LISTS else batch[name] for name in schema.names]
                writer.write_batch(pa.record_batch(columns, schema))
    file = run.place / _NAMES[rows]
    file.write(sink.getvalue())
    return file.uri
