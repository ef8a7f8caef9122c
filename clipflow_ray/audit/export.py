"""The ledger as one csv file, for people and programs that read no parquet."""

from tempfile import TemporaryFile
from typing import Final, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from clipflow_ray.audit.ledger import LEDGER
from clipflow_ray.columns import LEDGER_SCHEMA
from clipflow_ray.runs.bounded import temporary_files
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
    target = run.place / _NAMES[rows]
    with TemporaryFile() as file:  # the ledger may be larger than memory
        with pacsv.CSVWriter(file, schema) as writer:
            for part in run.parts(LEDGER):
                for batch in part.to_batches(columns=LEDGER_SCHEMA.names, filter=flagged):
                    columns = [pc.binary_join(batch[n], ";") if n in _LISTS else batch[n] for n in schema.names]
                    with temporary_files():
                        writer.write_batch(pa.record_batch(columns, schema))
        with temporary_files():
            file.seek(0)
        target.write_from(file)
    return target.uri
