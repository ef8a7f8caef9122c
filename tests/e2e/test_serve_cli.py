"""`clipflow-ray serve` from start to stop, as a user runs it. The checkpoint is tiny and not trained."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from clipflow_ray.config import TEST_TOWER, EncoderConfig, FlowConfig, Segment
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.model.checkpoint import Checkpoint, save_checkpoint
from clipflow_ray.model.encoder import Encoder
from clipflow_ray.model.flow import Flow
from clipflow_ray.serve.tokens import new_token
from tests.conftest import encoded, photo

CLI = [sys.executable, "-m", "clipflow_ray"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    tower = EncoderConfig(model=TEST_TOWER, pretrained="seed:0")
    segments = (Segment(feature="projected", size=224),)
    encoder = Encoder(tower, segments, device="cpu")
    config = FlowConfig(blocks=2, hidden=16)
    flow = Flow((32,), config)
    views = np.stack([photo(seed, (224, 224)).ravel() for seed in range(8)])
    flow.fit_standardizer(torch.from_numpy(encoder(views)["projected@224"]))
    calibration = Calibration.fit(np.linspace(0.5, 3.0, 199, dtype=np.float32), ["jpeg|256-512"] * 199)
    made = Checkpoint(
        encoder=tower,
        encoder_fingerprint=encoder.fingerprint,
        view=encoder.view,
        segments=segments,
        widths=(32,),
        flow_config=config,
        flow_state=flow.state_dict(),
        calibration=calibration,
    )
    path = str(tmp_path_factory.mktemp("served") / "checkpoint")
    save_checkpoint(made, path)
    return path


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        number = int(first.getsockname()[1])
    yield number


def test_serve_answers_and_on_sigterm_finishes_open_requests_and_exits_0(
    checkpoint: str, port: int, tmp_path: Path
) -> None:
    token, digest = new_token()
    (tmp_path / "tokens").write_text(f"{digest}  # a test\n")
    picture = tmp_path / "a.jpg"
    picture.write_bytes(encoded(photo(1)))
    command = [*CLI, "serve", "--checkpoint", checkpoint, "--port", str(port), "--tokens", str(tmp_path / "tokens")]
    with (tmp_path / "stderr").open("w") as errors:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        assert url == f"http://127.0.0.1:{port}", (tmp_path / "stderr").read_text()
        assert httpx.get(f"{url}/readyz").status_code == 200
        files = [("files", (f"{at}.jpg", picture.read_bytes())) for at in range(32)]
        assert httpx.post(f"{url}/v1/detect", files=files).json()["error"]["code"] == "unauthorized"

        here = subprocess.run([*CLI, "score", str(picture), "--checkpoint", checkpoint, "--json"], capture_output=True)
        environment = os.environ | {"CLIPFLOW_TOKEN": token}
        there = subprocess.run(
            [*CLI, "score", str(picture), "--url", url, "--json"], capture_output=True, env=environment
        )
        local, remote = json.loads(here.stdout), json.loads(there.stdout)
        assert remote["score"] == pytest.approx(local["score"], abs=1e-4)
        assert (remote["file"], remote["sha256"], remote["verdict"]) == (
            str(picture),
            local["sha256"],
            local["verdict"],
        )

        with ThreadPoolExecutor(1) as pool:
            headers = {"Authorization": f"Bearer {token}"}
            answer = pool.submit(httpx.post, f"{url}/v1/detect", files=files, headers=headers, timeout=60)
            time.sleep(0.2)
            server.send_signal(signal.SIGTERM)
            assert answer.result().status_code == 200
        assert server.wait(60) == 0, (tmp_path / "stderr").read_text()
        said = (tmp_path / "stderr").read_text()
        assert "Finishing the requests under way." in said and "Traceback" not in said and token not in said
    finally:
        if server.poll() is None:
            server.kill()
        server.communicate()


def test_a_new_token_is_printed_with_its_hash() -> None:
    done = subprocess.run([*CLI, "serve", "token", "new"], capture_output=True, text=True)
    token, digest = done.stdout.split()
    assert done.returncode == 0 and token.startswith("clipflow_") and len(digest) == 64
    again = subprocess.run([*CLI, "serve", "token", "new"], capture_output=True, text=True)
    assert again.stdout.split()[0] != token


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "--host", "0.0.0.0"), "serve token new"),
        (("serve", "--tokens", "/no/such/file"), "tokens file"),
        (("serve", "--alpha", "2"), "alpha"),
        (("score", "a.jpg", "--url", "http://127.0.0.1:1", "--checkpoint", "c"), "--url"),
    ],
)
def test_wrong_arguments_of_serve_give_one_sentence_and_exit_code_2(arguments: tuple[str, ...], words: str) -> None:
    done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
