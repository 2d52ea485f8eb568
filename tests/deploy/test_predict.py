"""`sward predict` on files, with a run of a small network."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sward
from sward import data
from sward.cli.main import main
from sward.data import normalise
from sward.deploy.predictor import as_pixels, labels_at, load
from tests.support.deployable import Pixelwise, make_run, register


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pixelwise:
    register(monkeypatch)
    monkeypatch.chdir(tmp_path)
    pixels = torch.randint(0, 256, (70, 90, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save("photo.png")
    return make_run(Path("run"), image_size=(64, 96))


def pixels_of(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


@torch.no_grad()
def logits_of_photo(network: Pixelwise) -> torch.Tensor:
    photo = torch.from_numpy(pixels_of("photo.png")).permute(2, 0, 1)
    padded = torch.nn.functional.pad(normalise(photo)[None], (0, 6, 0, 26), mode="replicate")
    return network(padded)[0, :, :70, :90]


def test_one_large_tile_is_the_whole_image_at_its_own_resolution(network: Pixelwise) -> None:
    words = ["predict", "run", "photo.png", "--tile", "200", "200", "--probabilities", "npy"]
    assert main(words) == 0
    expected = logits_of_photo(network)
    assert (pixels_of("run/predictions/photo-mask.png") == expected.argmax(0).numpy()).all()
    found = torch.from_numpy(np.load("run/predictions/photo-probabilities.npy"))
    torch.testing.assert_close(found, expected.softmax(0), atol=1e-5, rtol=0)
    tiled = sward.load("run").predict("photo.png", tile=(32, 48), overlap=8)
    # Only pixels beside the border of a tile see something else than in the whole image.
    assert (tiled == expected.argmax(0).numpy()).mean() > 0.9


def test_without_tiles_the_image_is_resized_for_the_network(network: Pixelwise) -> None:
    assert main(["predict", "run/checkpoints/best.pt", "photo.png", "--output", "out"]) == 0
    resized = data.transforms.resize_image(torch.from_numpy(pixels_of("photo.png")).permute(2, 0, 1), (64, 96))
    with torch.no_grad():
        logits = network(normalise(resized)[None])
    expected = torch.nn.functional.interpolate(logits, (70, 90), mode="bilinear", align_corners=False)[0].argmax(0)
    assert (pixels_of("out/photo-mask.png") == expected.numpy()).all()


def test_classes_are_resized_to_the_pixel_whose_centre_is_nearest() -> None:
    classes = torch.arange(9, dtype=torch.uint8).view(1, 3, 3)
    # Of three pixels in a row, the centres of two lie in the first and in the last.
    assert labels_at(classes, (2, 2)).tolist() == [[[0, 2], [6, 8]]]
    assert labels_at(classes[:, :2, :2], (3, 3)).tolist() == [[[0, 1, 1], [3, 4, 4], [3, 4, 4]]]


def test_masks_as_labels_and_probabilities_as_png(network: Pixelwise) -> None:
    words = ["predict", "run", "photo.png", "--output", "out", "--tile", "96", "96", "--probabilities", "png"]
    assert main([*words, "--as-labels", "10", "20", "30", "40", "255"]) == 0
    logits = logits_of_photo(network)
    with Image.open("out/photo-mask.png") as mask:
        assert mask.mode == "L"
        assert (np.array(mask) == np.array([10, 20, 30, 40, 255])[logits.argmax(0).numpy()]).all()
    for index in range(5):
        found = pixels_of(f"out/photo-probability-{index}.png")
        assert found.dtype == np.uint16
        assert np.abs(found / 65535 - logits.softmax(0)[index].numpy()).max() < 1e-4


def test_files_of_equal_name_and_existing_files(network: Pixelwise, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a/1.png", "b/1.png", "b/1.bmp"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (200, 10, 10)).save(name)
    assert main(["predict", "run", "a", "b", "--output", "out"]) == 0
    written = sorted(str(path.relative_to("out")) for path in Path("out").rglob("*-mask.png"))
    assert written == ["a/1-mask.png", "b/1.bmp-mask.png", "b/1.png-mask.png"]

    Path("truth").mkdir()
    Path("truth/1-mask.png").write_bytes(b"the truth")
    capsys.readouterr()
    assert main(["predict", "run", "a/1.png", "--output", "truth"]) == 2
    assert "truth/1-mask.png must not exist yet; use --overwrite or another --output" in capsys.readouterr().err
    assert Path("truth/1-mask.png").read_bytes() == b"the truth"
    assert list(Path("truth").iterdir()) == [Path("truth/1-mask.png")]
    assert main(["predict", "run", "a/1.png", "--output", "truth", "--overwrite"]) == 0
    assert pixels_of("truth/1-mask.png").shape == (8, 8)

    Image.new("RGB", (8, 8)).save("a/1-mask.png")
    assert main(["predict", "run", "a/1.png", "a/1-mask.png", "--output", "a", "--overwrite"]) == 2
    assert "must not hold the images themselves" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--overlap", "4"], "overlap must be given with a tile, got 4 without one"),
        (["--tile", "32", "0"], "tile must be two positive numbers, got 32 0"),
        (["--tile", "32", "64", "--overlap", "32"], "overlap must be at least 0 and below the sides of the tile, 32"),
        (["--as-labels", "0", "255"], "as_labels must be 5 different values from 0 to 255, one per class, got 0 255"),
    ],
)
def test_wrong_options(words: list[str], sentence: str, network: Pixelwise, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "run", "photo.png", *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("run/predictions").exists()


def test_images_of_the_wrong_kind_are_refused(network: Pixelwise) -> None:
    predictor = load("run")
    with pytest.raises(ValueError, match=r"image must be a uint8 array \[H, W, 3\], got float64 \[4, 4, 3\]"):
        predictor.predict(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match=r"image must be a uint8 tensor \[3, H, W\]"):
        predictor.predict(torch.zeros(4, 4, 3, dtype=torch.uint8))


def test_photos_of_phones_and_microscopes_are_read_as_in_training(network: Pixelwise, tmp_path: Path) -> None:
    upright = Image.open("photo.png")
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    turned.save("phone.png", exif=exif)
    predictor = sward.load("run")
    assert (predictor.predict("phone.png") == predictor.predict("photo.png")).all()

    grey = pixels_of("photo.png")[:, :, 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save("wide.png")
    with pytest.raises(ValueError, match=r"must have 8 bits per channel"):
        predictor.predict("wide.png")
    config = Path("run/config.json")
    stored = json.loads(config.read_text())
    stored["dataset"]["image_range"] = [0, 65535]
    config.write_text(json.dumps(stored))
    found = sward.load("run").predict("wide.png")
    assert (found == predictor.predict(np.repeat(grey[:, :, None], 3, axis=2))).all()


def test_pillow_images_are_read_as_their_files(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    transparent = np.full((4, 6, 4), 200, np.uint8)
    transparent[..., 3] = generator.integers(0, 256, (4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(transparent).save(tmp_path / "transparent.png", exif=exif)
    wide = generator.integers(0, 60000, (4, 6)).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    for name, value_range in (("transparent.png", None), ("wide.png", (0, 60000))):
        with Image.open(tmp_path / name) as image:
            assert torch.equal(as_pixels(image, value_range), as_pixels(tmp_path / name, value_range))
    with Image.open(tmp_path / "wide.png") as image, pytest.raises(ValueError, match=r"wide.png must have 8 bits"):
        as_pixels(image)
    with pytest.raises(ValueError, match="image from Pillow must have 8 bits per channel"):
        as_pixels(Image.fromarray(wide))


@pytest.mark.usefixtures("network")
def test_images_that_cannot_be_read_do_not_keep_the_others_from_being_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("photos").mkdir()
    whole = Path("photo.png").read_bytes()
    for name, content in (("a", whole[:200]), ("b", whole), ("c", b"no image"), ("d", whole)):
        Path(f"photos/{name}.png").write_bytes(content)
    assert main(["predict", "run", "photos"]) == 2
    said = capsys.readouterr().err
    assert "cannot read photos/a.png: the file is damaged or not an image" in said
    assert "cannot read photos/c.png: the file is damaged or not an image" in said
    assert said.splitlines()[-1] == (
        "sward predict: every image must be readable, got 2 of 4 that are not, such as photos/a.png; the others are "
        "predicted"
    )
    masks = sorted(path.name for path in Path("run/predictions").rglob("*-mask.png"))
    assert masks == ["b-mask.png", "d-mask.png"]


@pytest.mark.usefixtures("network")
def test_a_huge_photo_is_predicted_where_it_is_allowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # the photo has 6,300
    words = ["predict", "run", "photo.png", "--tile", "32", "48"]
    assert main(words) == 2
    assert "image photo.png must have at most 2000 pixels" in capsys.readouterr().err
    assert main([*words, "--allow-large"]) == 0
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert pixels_of("run/predictions/photo-mask.png").shape == (70, 90)
