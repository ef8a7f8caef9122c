"""Bearer tokens: shown once when they are made, kept only as sha256, compared in constant time."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from clipflow_ray.errors import ConfigError

_PREFIX: Final = "clipflow_"


def new_token() -> tuple[str, str]:
    """A token of 256 random bits, and the sha256 (hex) that the server keeps of it."""
    token = _PREFIX + secrets.token_urlsafe(32)
    return token, _digest(token.encode())


def accepted(authorization: bytes, hashes: Sequence[str]) -> bool:
    """Whether an Authorization header holds one of the tokens; takes the same time for each of them."""
    scheme, _, token = authorization.partition(b" ")
    digest = _digest(token.strip())
    matches = [hmac.compare_digest(digest, known) for known in hashes]
    return scheme.lower() == b"bearer" and any(matches)


def read_hashes(path: str) -> tuple[str, ...]:
    """The hashes of a tokens file: one per line, with comments after `#`. Raises ConfigError if there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the tokens file {path}: {error}") from error
    hashes = tuple(line.partition("#")[0].strip() for line in lines)
    if not any(hashes):
        raise ConfigError(f"{path} holds no token; append the hash line of `clipflow-ray serve token new`.")
    return tuple(value for value in hashes if value)


def _digest(token: bytes) -> str:
    return hashlib.sha256(token).hexdigest()
