"""Ray tasks list the inputs into a manifest; the driver sees counts alone, whatever the number of rows."""

from collections.abc import Sequence

import ray

from clipflow_ray.config import InventoryOptions
from clipflow_ray.data.inventory import check_apart, sources, write_source
from clipflow_ray.errors import InputError
from clipflow_ray.place import Place


def write_manifest(inputs: Sequence[Place], folder: Place, options: InventoryOptions | None = None) -> int:
    """List `inputs` into parquet files under `folder`, one task a source; returns the row count.

    An object that two inputs name is listed once; the lines of a list are a row each, whatever they repeat. Raises
    InputError when an input holds nothing or holds `folder` itself.
    """
    options = options or InventoryOptions()
    check_apart(inputs, folder)
    folder.make_folder()
    task = ray.remote(num_cpus=1)(write_source)
    found = sources(inputs, options.input_format)
    try:
        written = ray.get([task.remote(source, at, folder, options) for at, source in enumerate(found)])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    kept = {name for names, _ in written for name in names}
    for name in folder.names():  # by a listing that was cut off when the input held more
        if name.startswith("part-") and name not in kept:
            (folder / name).delete()
    count = sum(rows for _, rows in written)
    if count == 0:
        uris = ", ".join(place.uri for place in inputs)
        raise InputError(f"{uris} hold nothing to look at: check the path, or the prefix and its bucket.")
    return count
