"""What a file is, by its first bytes, and what it claims to be, by its name."""

import base64
import binascii
import struct
from typing import Final

HEAD: Final = 4096  # bytes that are enough to recognise a file

# A file with one of these endings calls itself an image: if it is none, that is an error.
IMAGE_SUFFIXES: Final = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".mpo"),
    *(".heic", ".heics", ".heif", ".hif", ".avif", ".avifs", ".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".jpm", ".jpc"),
    *(".ico", ".cur", ".psd", ".psb", ".svg", ".svgz", ".tga", ".exr", ".hdr", ".dds", ".pcx", ".ppm", ".pgm", ".pbm"),
    *(".pnm", ".qoi", ".cr2", ".cr3", ".crw", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf", ".pef", ".srw"),
)
# Files with these endings are no images; they are not read.
_OTHER_SUFFIXES: Final = (
    *(".txt", ".text", ".caption", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml"),
    *(".ini", ".cfg", ".conf", ".log", ".md", ".rst", ".html", ".htm", ".css", ".js", ".pdf", ".doc", ".docx", ".xls"),
    *(".xlsx", ".rtf", ".tex", ".bib", ".py", ".ipynb", ".sh", ".cls", ".cls2", ".transcript", ".npy", ".npz", ".pkl"),
    *(".pickle", ".pyd", ".pt", ".pth", ".ckpt", ".safetensors", ".onnx", ".h5", ".mat", ".db", ".sqlite", ".lock"),
    *(".md5", ".sha1", ".sha256", ".xmp", ".aae", ".thm", ".lst", ".arrow", ".feather", ".gitattributes", ".url"),
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".mp3", ".m4a", ".wav", ".flac", ".ogg"),
    *(".txt.gz", ".csv.gz", ".tsv.gz", ".json.gz", ".jsonl.gz"),
)
_OTHER_NAMES: Final = frozenset(
    {"thumbs.db", "ehthumbs.db", "desktop.ini", "license", "readme", "notice", "makefile", "_success", "icon\r"}
)
BMP_HEADERS: Final = {struct.pack("<I", size) for size in (12, 40, 52, 56, 64, 108, 124)}  # bytes of known headers
_CONTROL: Final = 0.05  # share of control characters that a text may have; of random bytes 9 % are
_BOXES: Final = {
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"), "HEIC"),
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"jp2 ", b"jpx "), "JPEG 2000"),
    b"crx ": "Canon raw",
}
_PICTURES: Final = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WebP"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "BigTIFF"),
    (0, b"MM\0+", "BigTIFF"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"8BPS", "Photoshop"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"DDS ", "DDS"),
    (0, b"qoif", "QOI"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"FUJIFILMCCD-RAW", "Fujifilm raw"),
    (0, b"IIRO", "Olympus raw"),
    (0, b"IIU\0", "Panasonic raw"),
)
_OTHERS: Final = (
    (0, b"PAR1", "a parquet file"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"PK\x05\x06", "an empty zip archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x1f\x8b", "compressed by gzip"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd"),
    (0, b"BZh", "compressed by bzip2"),
    (0, b"\xfd7zXZ\0", "compressed by xz"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (0, b"Rar!", "a RAR archive"),
    (0, b"ARROW1", "an Arrow file"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"SQLite format 3\0", "an SQLite database"),
    (0, b"%PDF", "a PDF"),
    (0, b"%!PS", "a PostScript document"),
    (0, b"gimp xcf", "a GIMP document"),
    (0, b"\0\0\1\0", "a Windows icon"),
    (0, b"\x1a\x45\xdf\xa3", "a video"),
    (4, b"ftyp", "a video"),
    (0, b"\x93NUMPY", "a NumPy file"),
    (0, b"\0\5\x16\7", "an AppleDouble file of macOS"),
    (0, b"\xd0\xcf\x11\xe0", "an OLE file, such as Thumbs.db"),
)


def picture_kind(head: bytes) -> str | None:
    """The name of the image format that begins with `head`, or None. Formats that are not decoded count too."""
    if head[4:8] == b"ftyp" and head[8:12] in _BOXES:
        return _BOXES[head[8:12]]
    found = next((name for at, magic, name in _PICTURES if head.startswith(magic, at)), None)
    if found == "WebP" and not head.startswith(b"RIFF"):
        return None
    if found == "BMP" and head[14:18] not in BMP_HEADERS:  # two letters alone may begin a text
        return None
    if found == "TIFF" and head[8:10] == b"CR":
        return "Canon raw"
    if found is None and (text := head[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")).startswith((b"<svg", b"<?xml")):
        return "SVG" if b"<svg" in text else None
    return found


def named_kind(head: bytes) -> str | None:
    """What a file with these first bytes is, such as `a tar archive`; None if it is text or of an unknown kind."""
    if kind := picture_kind(head):
        return f"an image ({kind})"
    if head[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    return next((name for at, magic, name in _OTHERS if head.startswith(magic, at)), None)


def kind_in_words(head: bytes) -> str:
    """What a file with these first bytes is, such as `a tar archive` or `text`."""
    if not head:
        return "empty"
    return named_kind(head) or ("text" if is_text(head) else "of an unknown kind")


def is_text(head: bytes) -> bool:
    """Whether the bytes begin a text: UTF-16 with its mark, or nearly no control characters."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True
    if any(head.startswith(magic, at) for at, magic, _ in _OTHERS):
        return False
    control = sum(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in head)
    return control <= _CONTROL * len(head)


def claims_image(name: str) -> bool:
    """Whether a file of this name calls itself an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def no_image_by_name(name: str) -> str | None:
    """Why a file of this name, which may have folders, is known to be no image; else None."""
    own = name.rsplit("/", 1)[-1]
    last = own.lower()
    if last.startswith("._") or "__MACOSX" in name.split("/")[:-1]:
        return "It is a file of macOS beside a picture."
    if last in _OTHER_NAMES:
        return f"{own} is no picture."
    ending = next((each for each in _OTHER_SUFFIXES if last.endswith(each)), None)
    return f"Files whose names end in {ending} are no pictures." if ending else None


def is_base64_picture(text: str) -> bool:
    """Whether a text is an encoded image in base64, with or without `data:`."""
    _, _, after = text.partition(";base64,")
    start = "".join((after or text)[:64].split())
    try:
        return picture_kind(base64.b64decode(start[: len(start) // 4 * 4], validate=True)) is not None
    except (binascii.Error, ValueError):
        return False
