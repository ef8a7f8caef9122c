"""Arguments that `clipflow-ray serve` refuses before it starts, and the settings of the endpoint."""

from pathlib import Path

import pytest

from clipflow_ray.config import ServeConfig, load_yaml
from clipflow_ray.errors import ConfigError
from clipflow_ray.serve.app import build_app
from clipflow_ray.serve.launch import check_address
from clipflow_ray.serve.tokens import accepted, new_token, read_hashes


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_on_loopback_no_token_is_needed(host: str) -> None:
    check_address(host, ())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_on_other_addresses_a_token_is_needed(host: str) -> None:
    with pytest.raises(ConfigError, match="serve token new"):
        check_address(host, ())


def test_a_tokens_file_holds_hashes_and_comments(tmp_path: Path) -> None:
    token, digest = new_token()
    path = tmp_path / "tokens"
    path.write_text(f"# of the team\n\n{digest}  # made today\n")
    hashes = read_hashes(str(path))
    assert hashes == (digest,)
    assert accepted(f"Bearer {token}".encode(), hashes) and accepted(f"bearer  {token} ".encode(), hashes)
    for wrong in (b"", b"Bearer", b"Bearer ", f"Basic {token}".encode(), digest.encode(), b"Bearer \xff"):
        assert not accepted(wrong, hashes)


@pytest.mark.parametrize("content", ["", "# nothing\n", None])
def test_a_tokens_file_without_a_token_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokens"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError):
        read_hashes(str(path))


@pytest.mark.parametrize(
    ("key", "value"), [("tokens", ("secret",)), ("detector_replicas", (3, 1)), ("alpha", 0.0), ("no_such_key", 1)]
)
def test_a_wrong_setting_is_named(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        load_yaml(ServeConfig, None, {key: value})
    with pytest.raises(ConfigError, match=key):
        build_app({key: value})


def test_building_the_application_loads_no_checkpoint() -> None:
    build_app({"checkpoint": "/no/such/checkpoint"})
