"""The registry of input formats: the name that a user gives to `--input-format`, and the class that implements it.

Every command finds its input formats here. To add a format, write one file with a subclass of
`clipflow_ray.inputs.format.InputFormat` and add one line to the table. If the format is not named, the formats are
tried in the order of the table.

The classes are named by strings, so that the settings and the help text know the names and import nothing.
"""

from typing import Final

FORMATS: Final = {
    "images": "clipflow_ray.inputs.images:Images",
    "manifest": "clipflow_ray.inputs.lists:Lists",
    "parquet": "clipflow_ray.inputs.parquet:Parquet",
    "webdataset": "clipflow_ray.inputs.webdataset:Webdataset",
    "tarstream": "clipflow_ray.inputs.webdataset:Tarstream",
    "zip": "clipflow_ray.inputs.zips:Zip",
    "hf": "clipflow_ray.inputs.imagefolder:Imagefolder",
}
