"""Patterns of object names: `*`, `?`, `[...]`, `**` and braces, as a shell has them.

A pattern that fits a folder takes everything below it. `*` does not cross a slash; `**` stands for any folders.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from clipflow_ray.errors import InputError

_WILD: Final = re.compile(r"[*?[]")
_BRACES: Final = re.compile(r"\{([^{}]*)\}")
_NUMBERS: Final = re.compile(r"(\d+)\.\.(\d+)")
_MOST: Final = 100_000


@dataclass(frozen=True)
class Selection:
    """Objects and folders by their URIs: those of `names`, and those that one of `patterns` fits."""

    names: frozenset[str] = frozenset()
    patterns: tuple[str, ...] = ()

    def keeps(self, uri: str) -> bool:
        """Whether an object is selected, or lies below a folder that is."""
        return self.named(uri) is not None or any(
            _fits(pattern.split("/"), uri.split("/")) for pattern in self.patterns
        )

    def named(self, uri: str) -> str | None:
        """The name of `names` that selects the object: its own or that of a folder above it."""
        if not self.names:
            return None
        parts = uri.split("/")
        above = ("/".join(parts[:end]) for end in range(len(parts), 0, -1))
        return next((each for each in above if each in self.names), None)

    def enters(self, folder: str) -> bool:
        """Whether the folder is selected or may hold objects that are."""
        inside = f"{folder.rstrip('/')}/"
        return (
            self.named(folder) is not None
            or any(name.startswith(inside) for name in self.names)
            or any(_fits(pattern.split("/"), folder.split("/"), partly=True) for pattern in self.patterns)
        )

    def __or__(self, other: "Selection") -> "Selection":
        return Selection(self.names | other.names, tuple(dict.fromkeys((*self.patterns, *other.patterns))))


def selection(uri: str) -> Selection:
    """What a URI with wildcards or braces selects. Raises InputError for more than 100,000 alternatives."""
    each = expanded(uri)
    return Selection(
        frozenset(name.rstrip("/") for name in each if not _WILD.search(name)),
        tuple(name.rstrip("/") for name in each if _WILD.search(name)),
    )


def fixed_folder(uri: str) -> str:
    """The URI of the folder above the first wildcard or brace, with its slash."""
    first = re.search(r"[*?[{]", uri)
    return uri[: uri.rfind("/", 0, first.start() if first else len(uri)) + 1]


def is_pattern(uri: str) -> bool:
    """Whether the URI has a wildcard or a brace that stands for alternatives."""
    return bool(_WILD.search(uri)) or expanded(uri) != [uri]


def expanded(text: str) -> list[str]:
    """`s-{000..002}.tar` -> three names; `{a,b}` -> two. A brace without a comma or a range stays as it is."""
    done, waiting = [], [text]
    while waiting:
        each = waiting.pop()
        found = next((brace for brace in _BRACES.finditer(each) if _alternatives(brace[1])), None)
        if found is None:
            done.append(each)
        else:
            options = _alternatives(found[1])
            waiting += [each[: found.start()] + option + each[found.end() :] for option in reversed(options)]
        if len(done) + len(waiting) > _MOST:
            raise InputError(f"{text} stands for more than {_MOST} names; use * instead.")
    return list(dict.fromkeys(done))


def fits_any(patterns: Iterable[str], below: str) -> bool:
    """Whether a pattern fits a path below an input, or a folder of it. A pattern without a slash fits in any folder."""
    parts = below.split("/")
    return any(
        _fits((name if "/" in name else f"**/{name}").lstrip("/").split("/"), parts)
        for pattern in patterns
        for name in expanded(pattern.rstrip("/"))
    )


def _alternatives(inside: str) -> list[str]:
    if numbers := _NUMBERS.fullmatch(inside):
        first, last = numbers[1], numbers[2]
        width = max(len(first), len(last)) if "0" in (first[:1], last[:1]) else 0
        low, high = int(first), int(last)
        if abs(high - low) > _MOST:
            raise InputError(f"{{{inside}}} stands for more than {_MOST} names; use * instead.")
        step = 1 if low <= high else -1
        return [str(number).zfill(width) for number in range(low, high + step, step)]
    return inside.split(",") if "," in inside else []


def _fits(pattern: Sequence[str], names: Sequence[str], partly: bool = False) -> bool:
    """Whether the pattern fits the path or a folder above it; `partly`: whether it may fit something below the path."""
    if not pattern:
        return True
    if not names:
        return partly
    if pattern[0] == "**":
        return _fits(pattern[1:], names, partly) or _fits(pattern, names[1:], partly)
    return fnmatchcase(names[0], pattern[0]) and _fits(pattern[1:], names[1:], partly)
