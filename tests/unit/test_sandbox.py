"""Decoding in a child process that may be killed: same pixels, same errors, and a timeout if the decoder hangs."""

import array
import errno
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipflow_ray import images, sandbox
from clipflow_ray.config import OPENAI_VIEW, ImageLimits
from clipflow_ray.errors import ImageError
from clipflow_ray.images import DecodedImage
from clipflow_ray.sandbox import DecodeChild
from tests.conftest import scan_bomb

LIMITS = ImageLimits()
PIXELS = np.random.default_rng(0).integers(0, 256, (300, 420, 3), dtype=np.uint8)


@pytest.fixture
def child() -> Iterator[DecodeChild]:
    made = DecodeChild()
    yield made
    made.close()


def encoded(image_format: str, pixels: np.ndarray = PIXELS, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


BOMB = scan_bomb()
NO_SCAN_LIMIT = LIMITS.model_copy(update={"max_jpeg_scans": 10_000, "max_seconds": 1.0})


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_the_child_returns_the_same_image_as_decoding_in_this_process(child: DecodeChild, image_format: str) -> None:
    data = encoded(image_format)
    here, there = images.decode(data, LIMITS), child.decode(data, LIMITS)
    np.testing.assert_array_equal(there.rgb, here.rgb)
    assert {**asdict(there), "rgb": None} == {**asdict(here), "rgb": None}
    for changes in ({}, {"kind": "crop"}, {"sizes": (336, 64), "interpolation": "bilinear", "resize_mode": "squash"}):
        spec = OPENAI_VIEW.model_copy(update=changes)
        view = child.decode(data, LIMITS, spec)
        np.testing.assert_array_equal(view.rgb, images.views(here.rgb, spec))
        assert (view.width, view.height) == (420, 300)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty"),
        (b"hello, this is text", "unsupported_format"),
        (encoded("JPEG")[:-40], "truncated"),
        (encoded("PNG", PIXELS[:20]), "too_small"),
    ],
)
def test_the_child_returns_the_code_and_message_of_an_error(child: DecodeChild, data: bytes, code: str) -> None:
    with pytest.raises(ImageError) as here:
        images.decode(data, LIMITS)
    with pytest.raises(ImageError) as there:
        child.decode(data, LIMITS)
    assert (there.value.item_code, str(there.value)) == (here.value.item_code, str(here.value))
    assert there.value.item_code == code


def test_a_scan_bomb_is_cut_off_and_the_next_image_decodes(child: DecodeChild) -> None:
    child.decode(encoded("PNG"), LIMITS)
    first = child.pid
    with pytest.raises(ImageError) as caught:
        child.decode(BOMB, NO_SCAN_LIMIT)
    assert caught.value.item_code == "decode_timeout"
    np.testing.assert_array_equal(child.decode(encoded("PNG"), LIMITS).rgb, PIXELS)
    assert child.pid != first and not alive(first)


def test_images_beside_a_scan_bomb_and_a_broken_one_all_decode_in_their_order(child: DecodeChild) -> None:
    pictures = [np.full((64, 48 + at, 3), at, np.uint8) for at in range(6)]
    contents = [encoded("PNG", pixels) for pixels in pictures]
    outcomes = child.decode_all([*contents[:3], BOMB, b"text", *contents[3:]], NO_SCAN_LIMIT)
    assert [o.item_code for o in outcomes if isinstance(o, ImageError)] == ["decode_timeout", "unsupported_format"]
    assert [isinstance(o, ImageError) for o in outcomes] == [False] * 3 + [True] * 2 + [False] * 3
    for outcome, pixels in zip(outcomes[:3] + outcomes[5:], pictures, strict=True):
        assert isinstance(outcome, DecodedImage)
        np.testing.assert_array_equal(outcome.rgb, pixels)
    assert child.decode_all([], LIMITS) == []


def test_an_image_is_decoded_although_the_machine_gives_the_child_little_time(child: DecodeChild) -> None:
    """The child is stopped for longer than `max_seconds` again and again, as on a machine with much to do."""
    limits = LIMITS.model_copy(update={"max_seconds": 0.3})
    child.decode(encoded("PNG"), LIMITS)
    data = encoded("PNG", np.random.default_rng(1).integers(0, 256, (800, 800, 3), dtype=np.uint8))
    assert child.pid is not None
    pid, done = child.pid, threading.Event()

    def hinder() -> None:
        while not done.is_set():
            os.kill(pid, signal.SIGSTOP)
            done.wait(0.4)
            os.kill(pid, signal.SIGCONT)
            done.wait(0.02)

    hinderer = threading.Thread(target=hinder)
    hinderer.start()
    try:
        began = time.monotonic()
        images_found = child.decode_all([data, data], limits)
        assert time.monotonic() - began > limits.max_seconds
    finally:
        done.set()
        hinderer.join()
    assert [type(image) for image in images_found] == [DecodedImage] * 2
    assert child.pid == pid


def test_a_child_that_hangs_without_computing_is_cut_off_by_the_wall_clock(child: DecodeChild) -> None:
    child.decode(encoded("PNG"), LIMITS)
    assert child.pid is not None
    first = child.pid
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(ImageError, match="did not end within") as caught:
        child.decode(encoded("PNG"), LIMITS.model_copy(update={"max_wall_seconds": 0.3}))
    assert caught.value.item_code == "decode_timeout"
    np.testing.assert_array_equal(child.decode(encoded("PNG"), LIMITS).rgb, PIXELS)
    assert not alive(first)


@pytest.mark.parametrize("wrong", [PIXELS, array.array("i", [1, 2]), Path("a.jpg"), "a.jpg", None, memoryview(b"x")])
def test_what_is_not_bytes_is_refused_before_anything_is_sent(child: DecodeChild, wrong: Any) -> None:
    good = encoded("PNG")
    child.decode(good, LIMITS)
    first = child.pid
    for contents in ([wrong], [good, good, good, wrong]):
        with pytest.raises(TypeError, match="An encoded image is bytes"):
            child.decode_all(contents, LIMITS)
    np.testing.assert_array_equal(child.decode(good, LIMITS).rgb, PIXELS)
    assert child.pid == first


def test_images_sent_to_a_child_that_is_killed_are_decoded_by_the_next_one(child: DecodeChild) -> None:
    contents = [encoded("PNG", np.full((400, 400, 3), at, np.uint8)) for at in range(200)]
    child.decode(contents[0], LIMITS)
    first = child.pid
    killer = threading.Timer(0.05, os.kill, (first, signal.SIGKILL))
    killer.start()
    outcomes = child.decode_all(contents, LIMITS)
    killer.join()
    assert [int(o.rgb[0, 0, 0]) for o in outcomes if isinstance(o, DecodedImage)] == list(range(200))
    assert child.pid != first


def test_an_interrupted_call_leaves_no_answers_for_the_next_call(child: DecodeChild) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt(signum: int, frame: object) -> None:
        raise Interrupted

    child.decode(encoded("PNG"), LIMITS)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Interrupted):
            child.decode_all([BOMB, encoded("PNG", PIXELS[::-1])], NO_SCAN_LIMIT)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    np.testing.assert_array_equal(child.decode(encoded("PNG"), LIMITS).rgb, PIXELS)


def test_a_decoder_that_dies_each_time_is_tried_three_times(child: DecodeChild) -> None:
    killed: set[int] = set()
    done = threading.Event()

    def kill_each_child() -> None:
        while not done.is_set():
            pid = child.pid
            if pid is not None and pid not in killed and cpu_ticks(pid) > 60:  # it has started up and decodes the bomb
                os.kill(pid, signal.SIGSEGV)
                killed.add(pid)
            time.sleep(0.01)

    killer = threading.Thread(target=kill_each_child)
    killer.start()
    try:
        with pytest.raises(ImageError) as caught:
            child.decode(BOMB, NO_SCAN_LIMIT.model_copy(update={"max_seconds": 60.0}))
    finally:
        done.set()
        killer.join()
    assert caught.value.item_code == "decoder_crash" and len(killed) == 3
    np.testing.assert_array_equal(child.decode(encoded("PNG"), LIMITS).rgb, PIXELS)


def test_a_child_killed_between_images_is_replaced_without_an_error(child: DecodeChild) -> None:
    child.decode(encoded("PNG"), LIMITS)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    np.testing.assert_array_equal(child.decode(encoded("PNG"), LIMITS).rgb, PIXELS)


def test_a_killed_zygote_process_is_replaced_without_an_error() -> None:
    first = DecodeChild()
    first.decode(encoded("PNG"), LIMITS)
    os.kill(parent_of(first.pid), signal.SIGKILL)
    second = DecodeChild()
    np.testing.assert_array_equal(second.decode(encoded("PNG"), LIMITS).rgb, PIXELS)
    assert parent_of(second.pid) not in (1, os.getpid())
    first.close()
    second.close()


def test_the_child_gets_no_secrets(child: DecodeChild, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-9f2b")
    child.decode(encoded("PNG"), LIMITS)
    assert b"canary-9f2b" not in Path(f"/proc/{child.pid}/environ").read_bytes()


def unusual() -> dict[str, bytes]:
    """Images whose decoding uses rarely used parts of Pillow."""
    image = Image.fromarray(PIXELS)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    wide = (np.arange(300 * 420, dtype=np.uint32).reshape(300, 420) % 65536).astype(np.uint16)
    transparent = image.quantize(16)
    frames = [image.rotate(90 * turn) for turn in range(4)]
    saved: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "exif.jpg": (image, {"exif": exif, "format": "JPEG", "xmp": b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"}),
        "exif.png": (image, {"exif": exif, "format": "PNG"}),
        "exif.webp": (image, {"exif": exif, "format": "WEBP"}),
        "mpo.jpg": (image, {"format": "MPO", "save_all": True, "append_images": frames[1:]}),
        "cmyk.jpg": (image.convert("CMYK"), {"format": "JPEG"}),
        "progressive.jpg": (image.convert("L"), {"format": "JPEG", "progressive": True}),
        "palette.png": (transparent, {"format": "PNG", "transparency": 3}),
        "wide.png": (Image.fromarray(wide), {"format": "PNG"}),
        "bits.png": (image.convert("1"), {"format": "PNG"}),
        "alpha.png": (image.convert("LA"), {"format": "PNG"}),
        "animated.webp": (frames[0], {"format": "WEBP", "save_all": True, "append_images": frames[1:]}),
        "animated.png": (frames[0], {"format": "PNG", "save_all": True, "append_images": frames[1:]}),
        "animated.gif": (frames[0], {"format": "GIF", "save_all": True, "append_images": frames[1:]}),
        "exif.tiff": (image.copy(), {"exif": exif, "format": "TIFF", "compression": "tiff_lzw"}),
        "jpeg.tiff": (image.copy(), {"format": "TIFF", "compression": "jpeg"}),
        "deflate.tiff": (image.convert("L"), {"format": "TIFF", "compression": "tiff_deflate"}),
        "pages.tiff": (image.copy(), {"format": "TIFF", "save_all": True, "append_images": [image.rotate(90)]}),
        "palette.bmp": (transparent, {"format": "BMP"}),
        "exif.avif": (image, {"exif": exif, "format": "AVIF", "speed": 10}),
        "animated.avif": (frames[0], {"format": "AVIF", "save_all": True, "append_images": frames[1:], "speed": 10}),
        "transparent.gif": (transparent, {"format": "GIF", "transparency": 3}),
    }
    result = {}
    for name, (picture, options) in saved.items():
        buffer = io.BytesIO()
        picture.save(buffer, **options)
        result[name] = buffer.getvalue()
    return result


@pytest.mark.parametrize(("name", "data"), unusual().items())
def test_a_child_that_can_open_no_file_decodes_unusual_images_too(child: DecodeChild, name: str, data: bytes) -> None:
    here, there = images.decode(data, LIMITS), child.decode(data, LIMITS)
    np.testing.assert_array_equal(there.rgb, here.rgb)
    assert {**asdict(there), "rgb": None} == {**asdict(here), "rgb": None}


def test_the_child_can_open_no_file_and_no_socket() -> None:
    code = (
        "import os, socket, sys\nfrom clipflow_ray import images, sandbox\n"
        "def tried(data, limits):\n"
        "    for attempt in (lambda: open(os.devnull), socket.socket, lambda: socket.create_server(('127.0.0.1', 0)),\n"
        "                    os.pipe):\n"
        "        try: attempt()\n"
        "        except OSError as error: print(error.errno)\n"
        "        else: print('opened')\n"
        "    sys.stdout.flush()\n"
        "    raise sandbox.ImageError('empty', 'tried')\n"
        "images.decode = tried\nsandbox.run_zygote(int(sys.argv[1]))"
    )
    control, theirs = socket.socketpair()
    ours, childs = socket.socketpair()
    with control, ours:
        command = [sys.executable, "-c", code, str(theirs.fileno())]
        with subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True) as zygote:
            theirs.close()
            socket.send_fds(control, [b"c"], [childs.fileno()])
            childs.close()
            sandbox._send(ours, json.dumps({"limits": LIMITS.model_dump(), "view": None}).encode(), b"")
            answer, _ = sandbox._receive(ours)
            control.recv(4)
            control.close()
            ours.close()
            assert zygote.stdout is not None
            assert zygote.stdout.read().split() == [str(errno.EMFILE)] * 4
    assert json.loads(answer)["error_code"] == "empty"


def test_the_child_can_write_no_file_and_allocate_at_most_2_gib(child: DecodeChild) -> None:
    child.decode(encoded("PNG"), LIMITS)
    limits = Path(f"/proc/{child.pid}/limits").read_text()
    assert [line.split()[-3:-1] for line in limits.splitlines() if line.startswith("Max file size")] == [["0", "0"]]
    (line,) = [line for line in limits.splitlines() if line.startswith("Max address space")]
    held = int(Path(f"/proc/{child.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    assert 2**31 <= int(line.split()[-3]) <= 2**31 + held  # 2 GiB beyond the memory that it inherited


def test_the_child_ends_with_its_parent() -> None:
    code = (
        "import sys, time; from clipflow_ray.sandbox import DecodeChild; from clipflow_ray.config import ImageLimits\n"
        "child = DecodeChild(); child.decode(sys.stdin.buffer.read(), ImageLimits()); print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdin and parent.stdout
        parent.stdin.write(encoded("PNG"))
        parent.stdin.close()
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    deadline = time.monotonic() + 30
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int | None) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] not in "ZX"
    except FileNotFoundError:
        return False


def parent_of(pid: int | None) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().split(") ")[1].split()[1])


def cpu_ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().split(") ")[1].split()
    except FileNotFoundError:
        return 0
    return int(fields[11]) + int(fields[12])
