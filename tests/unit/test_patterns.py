"""Which names a pattern stands for."""

import pytest

from clipflow_ray.errors import InputError
from clipflow_ray.inputs.patterns import expanded, fits_any, fixed_folder, is_pattern, selection


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("s-{000..002}.tar", ["s-000.tar", "s-001.tar", "s-002.tar"]),
        ("s-{8..10}", ["s-8", "s-9", "s-10"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{a,b}/{1..2}", ["a/1", "a/2", "b/1", "b/2"]),
        ("x{a,{b,c}}", ["xa", "xb", "xc"]),
        ("{a}-{}", ["{a}-{}"]),
        ("a{b", ["a{b"]),
    ],
)
def test_braces_stand_for_names(text: str, names: list[str]) -> None:
    assert sorted(expanded(text)) == sorted(names)
    assert is_pattern(text) == (names != [text])


def test_too_many_names_are_refused() -> None:
    for text in ("{1..9999999}", "{1..999}{1..999}"):
        with pytest.raises(InputError, match="more than"):
            expanded(text)


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("*.jpg", "a.jpg", True),
        ("*.jpg", "deep/a.jpg", True),
        ("*.jpg", "a.png", False),
        ("thumbs", "x/thumbs/a.jpg", True),
        ("/thumbs", "x/thumbs/a.jpg", False),
        ("x/*.jpg", "x/a.jpg", True),
        ("x/*.jpg", "x/y/a.jpg", False),
        ("x/**/*.jpg", "x/y/z/a.jpg", True),
        ("x/**/*.jpg", "x/a.jpg", True),
        ("{x,y}/", "y/a.jpg", True),
        ("x", "xy/a.jpg", False),
    ],
)
def test_a_pattern_fits_a_file_or_a_folder_above_it(pattern: str, path: str, fits: bool) -> None:
    assert fits_any([pattern], path) == fits


def test_only_folders_that_may_hold_something_are_entered() -> None:
    chosen = selection("/d/{a,b}/*.jpg") | selection("/d/c/x{1,2}.png") | selection("/e/**/f/*")
    entered = {path: chosen.enters(path) for path in ("/d", "/d/a", "/d/c", "/d/z", "/d/a/deep", "/e/1/2/3", "/f")}
    assert entered == {
        "/d": True,
        "/d/a": True,
        "/d/c": True,
        "/d/z": False,
        "/d/a/deep": False,
        "/e/1/2/3": True,
        "/f": False,
    }
    kept = [path for path in ("/d/a/1.jpg", "/d/c/x2.png", "/d/c/x3.png", "/e/f/1", "/e/1/f/2/3") if chosen.keeps(path)]
    assert kept == ["/d/a/1.jpg", "/d/c/x2.png", "/e/f/1", "/e/1/f/2/3"]


@pytest.mark.parametrize(
    ("uri", "folder"), [("/a/b*/c", "/a/"), ("s3://b/x-{1,2}.tar", "s3://b/"), ("s3://b/a//c?", "s3://b/a//")]
)
def test_the_fixed_folder_ends_before_the_first_sign(uri: str, folder: str) -> None:
    assert fixed_folder(uri) == folder
