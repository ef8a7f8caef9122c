"""What people hold of a picture -> encoded bytes: bytes, a path, a file object, a PIL image or an array.

`Detector` and `Client` take the same kinds. Pixels without a file are encoded as a PNG, which keeps each of them.
"""

import io
import os
from collections.abc import Sequence
from typing import Any, Final, Protocol, TypeGuard, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipflow_ray.errors import ItemError

_KINDS: Final = (
    "bytes, the path of a file, a binary file object, a PIL image, or a uint8 array of shape [height, width, 3]"
)
_ORIENTATION: Final = 0x0112
# Modes that a PNG holds as they are. The other ones are converted first, to the mode beside them.
_SAVED: Final = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
_CONVERTED: Final = {
    "CMYK": "RGB",
    "YCbCr": "RGB",
    "HSV": "RGB",
    "RGBX": "RGB",
    "PA": "RGBA",
    "RGBa": "RGBA",
    "La": "LA",
}


@runtime_checkable
class BinaryFile(Protocol):
    """A file object that is open for reading bytes."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes from here on."""
        ...


Picture = bytes | bytearray | memoryview | str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | BinaryFile


def is_picture(given: object) -> TypeGuard[Picture]:
    """Whether `given` is one picture. Nothing is read."""
    if isinstance(given, np.ndarray):
        return given.dtype == np.uint8 and given.ndim == 3 and given.shape[2] == 3 and given.size > 0
    if isinstance(given, Image.Image):
        return given.mode in _SAVED or given.mode in _CONVERTED
    if isinstance(given, bytes | bytearray | memoryview | str | os.PathLike):
        return True
    return isinstance(given, BinaryFile) and not isinstance(given, io.TextIOBase | type)


def pictures(given: object) -> list[Picture]:
    """The pictures of a sequence. Raises TypeError at once if it is no sequence or if a member is no picture."""
    if not isinstance(given, Sequence):
        raise TypeError(f"A picture is {_KINDS}; several are a list of these. This is {_described(given)}.")
    found: list[Picture] = []
    for at, each in enumerate(list(given)):
        if not is_picture(each):
            raise TypeError(f"A picture is {_KINDS}. Number {at} of the sequence is {_described(each)}.")
        found.append(each)
    return found


def encoded(picture: Picture, max_bytes: int) -> bytes:
    """The encoded bytes of a picture, of which at most `max_bytes` and one more are read.

    Raises ItemError with bad_uri, not_found, access_denied, read_failed or too_large_bytes if a file cannot be read,
    and with decode_failed if Pillow cannot load a PIL image. Raises TypeError if a file object gives no bytes.
    """
    if isinstance(picture, Image.Image):
        return _png(picture)
    if isinstance(picture, np.ndarray):
        return _png(Image.fromarray(np.ascontiguousarray(picture)))
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    data = _read(picture, max_bytes)
    if not isinstance(data, bytes):
        raise TypeError(f"The file object gives {type(data).__name__}; open it for reading bytes.")
    if len(data) > max_bytes:
        raise ItemError("too_large_bytes", f"More than {max_bytes} bytes, which is the limit.")
    return data


def named(picture: Picture, number: int) -> str:
    """The name of a file without its folder, or `image-N` for a picture that has none."""
    if isinstance(picture, str | os.PathLike):
        # On Linux a file name may be bytes that are not valid text.
        return os.path.basename(os.fspath(picture)).encode("utf-8", "replace").decode()
    return f"image-{number}"


def _read(picture: str | os.PathLike[str] | BinaryFile, max_bytes: int) -> bytes:
    if not isinstance(picture, str | os.PathLike):
        return picture.read(max_bytes + 1)
    path = os.fspath(picture)
    if isinstance(picture, str) and "://" in picture:
        raise ItemError("bad_uri", "Only paths of this machine are read here; read the object, and give its bytes.")
    try:
        with open(path, "rb") as file:
            return file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise ItemError("not_found", "There is no such file.") from error
    except PermissionError as error:
        raise ItemError("access_denied", "The file may not be read.") from error
    except IsADirectoryError as error:
        raise ItemError("read_failed", "This is a folder; `detect_folder` takes it.") from error
    except (OSError, ValueError) as error:  # ValueError: the path holds a NUL
        raise ItemError("read_failed", f"The file cannot be read: {type(error).__name__}.") from error


def _png(image: Image.Image) -> bytes:
    """A PNG of the same pixels, with the orientation that the EXIF of `image` names."""
    out = io.BytesIO()
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
        if image.mode in _CONVERTED:
            image = image.convert(_CONVERTED[image.mode])
        exif = Image.Exif()
        if orientation != 1:
            exif[_ORIENTATION] = orientation
        image.save(out, "PNG", compress_level=1, exif=exif.tobytes() if len(exif) else b"")
    except Exception as error:  # Pillow reads the file of an image only now, and raises many types if it is damaged
        raise ItemError("decode_failed", f"Pillow cannot load the image: {type(error).__name__}.") from error
    return out.getvalue()


def _described(given: Any) -> str:
    if isinstance(given, np.ndarray):
        return f"an array of {given.dtype} and shape {list(given.shape)}"
    if isinstance(given, Image.Image):
        return f"a PIL image of mode {given.mode}; convert it to RGB"
    if isinstance(given, io.TextIOBase):
        return "a text file; open it with 'rb'"
    return f"a {type(given).__name__}"
