import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipflow_ray.config import ProxyConfig
from clipflow_ray.errors import InputError
from clipflow_ray.train.picture import draw, radial_profile
from tests.conftest import encoded, photo

FEW = {name: ProxyConfig().families[name] for name in ("low_pass", "tone")}


def test_the_picture_of_proxies_is_a_png_and_skips_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for at in range(3):
        (tmp_path / "in" / f"{at}.jpg").write_bytes(encoded(photo(at)))
    (tmp_path / "in" / "note.jpg").write_text("no image")
    assert draw([str(tmp_path / "in")], str(tmp_path / "out.png"), ProxyConfig()) == 3
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 500


def test_the_picture_reads_every_input_format(tmp_path: Path) -> None:
    images = [encoded(photo(at)) for at in range(4)]
    (tmp_path / "0.jpg").write_bytes(images[0])
    (tmp_path / "list.txt").write_text("0.jpg\nabsent.jpg\n")
    pq.write_table(pa.table({"image": images[1:3]}), tmp_path / "two.parquet")
    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        member = tarfile.TarInfo("3.jpg")
        member.size = len(images[3])
        archive.addfile(member, io.BytesIO(images[3]))
    inputs = [str(tmp_path / name) for name in ("list.txt", "two.parquet", "one.tar")]
    assert draw(inputs, str(tmp_path / "out.png"), ProxyConfig(families=FEW)) == 4


def test_a_folder_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.jpg").write_text("no image")
    with pytest.raises(InputError, match="No readable image"):
        draw([str(tmp_path)], str(tmp_path / "out.png"), ProxyConfig())


@pytest.mark.parametrize("size", [224, 336, 448])
def test_the_radial_profile_is_flat_for_white_noise_and_falls_for_a_photograph(size: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3)).astype(np.uint8)
    flat = radial_profile(noise)
    assert len(flat) == size // 2 + 1
    assert np.ptp(flat[5:]) < 1.0
    natural = radial_profile(photo(0, (size, size)))
    assert natural[5] - natural[100] > 2.0
