"""Ray tasks list the inputs into a manifest; the driver sees counts alone, whatever the number of rows."""

from collections.abc import Sequence

import ray
from pyarrow.fs import FileSelector

from clipflow_ray.config import InventoryOptions, S3Options
from clipflow_ray.data.inventory import check_apart, sources, write_source
from clipflow_ray.errors import InputError
from clipflow_ray.storage import filesystem, normalized


def write_manifest(inputs: Sequence[str], folder: str, s3: S3Options, options: InventoryOptions | None = None) -> int:
    """List `inputs` into parquet files under `folder`, one task a source; returns the row count.

    An object that two inputs name is listed once; the lines of a list are a row each, whatever they repeat. Raises
    InputError when an input holds nothing or holds `folder` itself.
    """
    folder, options = normalized(folder), options or InventoryOptions()
    check_apart(inputs, folder)
    fs, path = filesystem(folder, s3)
    fs.create_dir(path, recursive=True)
    task = ray.remote(num_cpus=1)(write_source)
    found = sources(inputs, s3, options.input_format)
    try:
        written = ray.get([task.remote(source, at, folder, s3, options) for at, source in enumerate(found)])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    kept = {name for names, _ in written for name in names}
    for left in fs.get_file_info(FileSelector(path)):  # by a listing that was cut off when the input held more
        if left.base_name.startswith("part-") and left.base_name not in kept:
            fs.delete_file(left.path)
    count = sum(rows for _, rows in written)
    if count == 0:
        raise InputError(f"{', '.join(inputs)} hold nothing to look at: check the path, or the prefix and its bucket.")
    return count
