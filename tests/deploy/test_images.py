"""Which files are taken, what their results are called, and images that look like decompression bombs."""

from pathlib import Path

import pytest
from PIL import Image

from sward.deploy.images import find_images, output_names, pixel_limit


@pytest.fixture(autouse=True)
def pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "a/1.png",
        "a/10.png",
        "a/2.png",
        "a/deep/1.tif",
        "a/x.gif",
        "a/x.png",
        "b/1.png",
        "a/done/1-mask.png",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3)).save(name)
    Path("a/notes.txt").write_text("not an image")


def test_folders_patterns_and_files() -> None:
    images, others = find_images([Path("a")], leave_out=Path("a/done"))
    assert [str(path) for path in images] == ["a/1.png", "a/2.png", "a/10.png", "a/deep/1.tif", "a/x.gif", "a/x.png"]
    assert others == 1
    images, _ = find_images([Path("b/1.png"), Path("*/[12].png"), Path("a/**/*.tif")], leave_out=Path("out"))
    assert [str(path) for path in images] == ["b/1.png", "a/1.png", "a/2.png", "a/deep/1.tif"]
    # Asked for by name, a folder of results is read like any other.
    assert find_images([Path("a/done")], leave_out=Path("a/done"))[0] == [Path("a/done/1-mask.png")]


@pytest.mark.parametrize("path", ["nowhere.png", "*.jpg", "empty"])
def test_nothing_found_is_said(path: str) -> None:
    Path("empty").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no image"):
        find_images([Path(path)], leave_out=Path("out"))


def test_names_are_distinct_and_mirror_folders() -> None:
    names = output_names([Path("a/1.png"), Path("b/1.png"), Path("a/x.gif"), Path("a/x.png"), Path("a/deep/1.tif")])
    assert [str(name) for name in names] == ["a/1", "b/1", "a/x.gif", "a/x.png", "a/deep/1"]
    assert [str(name) for name in output_names([Path("a/deep/1.tif")])] == ["1"]


def test_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (50, 50)).save("large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"image large.png must have at most 2000 pixels.*--allow-large"):
        with pixel_limit([Path("a/1.png"), Path("large.png")], allow_large=False):
            pass
    with pixel_limit([Path("large.png")], allow_large=True):
        Image.open("large.png").load()
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_linked_images_keep_their_own_names() -> None:
    """As in a folder of git-annex or DVC, where every image is a link to a file named by its content."""
    Path("store").mkdir()
    Image.new("RGB", (4, 3)).save("store/SHA256E-s1--aaaa.png")
    Path("linked/below").mkdir(parents=True)
    for name in ("linked/case1.png", "linked/below/case2.png"):
        Path(name).symlink_to(Path("store/SHA256E-s1--aaaa.png").resolve())
    Path("linked/elsewhere").symlink_to(Path("b").resolve())
    Path("linked/round").symlink_to(Path("linked").resolve())
    images, _ = find_images([Path("linked"), Path("linked/case1.png").absolute()], leave_out=Path("out"))
    assert [str(name) for name in output_names(images)] == ["below/case2", "case1", "elsewhere/1"]


def test_films_and_data_are_no_images() -> None:
    for name in ("clip.mpg", "weights.h5"):
        Path("b", name).touch()
    assert find_images([Path("b")], leave_out=Path("out")) == ([Path("b/1.png")], 2)
