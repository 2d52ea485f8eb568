"""`sward data check`: what it finds in a folder, and the command that it prints."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sward import data
from sward.cli.main import main
from sward.data import FolderOptions, read_image
from sward.data.survey import count_values, survey
from sward.training.run_folder import RunFolder
from tests.support.folder_data import wide_png
from tests.support.polyp_folder import Write

DISC = (np.hypot(*(np.indices((48, 64)) - 24)) < 15).astype(np.uint8)
RADII = np.hypot(*(np.indices((48, 64)) - np.array([23.3, 31.7])[:, None, None]))
SOFT = np.clip(128 + 150 * (15 - RADII), 0, 255).astype(np.uint8)
"""A disc with an edge of more grey values than there may be classes."""


def write_frames(root: Path, write: Write, mask: np.ndarray, *, suffix: str = ".png", count: int = 3) -> None:
    for number in range(count):
        write(root / f"images/{number}.png", np.full((48, 64, 3), number, np.uint8))
        write(root / f"masks/{number}{suffix}", mask)


@pytest.mark.parametrize(
    ("mask", "suffix", "options"),
    [
        (DISC, ".png", "--classes background,foreground --split 80/10/10"),
        (255 * DISC, ".png", "--classes background,foreground --mask-values 0,255 --split 80/10/10"),
        (255 * DISC, ".jpg", "--classes background,foreground --mask-values 0,255 --split 80/10/10"),
        (np.where(DISC == 0, 255, 2 - DISC[::-1]).astype(np.uint8), ".png", "--classes class0,class1,class2 --mask-v"),
        (np.stack([200 * DISC, 0 * DISC, 0 * DISC], -1), ".png", "--mask-values '#000000,#c80000'"),
        (7 * DISC, ".png", "--mask-values 0,7"),
        (SOFT, ".png", "--classes background,foreground --mask-values 0-127,128-255 --split 80/10/10"),
    ],
)
def test_the_command_names_the_values(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str], mask: np.ndarray, suffix: str, options: str
) -> None:
    write_frames(tmp_path, write, mask, suffix=suffix)
    assert main(["data", "check", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"train with:  sward train own --data {tmp_path}" in printed
    assert options in printed
    teacher, student = (line[13:] for line in printed.splitlines()[-2:])
    assert teacher == f"{student.replace('train', 'train-teacher', 1)} --trunk-checkpoint dinov2_vits14_pretrain.pth"
    assert "images:      3 all" in printed
    assert "sizes:       64 x 48 (3)" in printed


def test_the_command_reads_the_masks_that_were_looked_at(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "my photos"
    write_frames(root, write, DISC, count=10)
    for number in range(10):
        write(root / f"truth/GT_{number}.png", np.where(DISC == 1, 7, 9).astype(np.uint8))
    patterns = ["--images", "images", "--masks", "truth/GT_{name}.png"]
    assert main(["data", "check", str(root), *patterns]) == 0
    command = capsys.readouterr().out.split("train with:  ")[1].strip()
    assert "--images images --masks 'truth/GT_{name}.png' --classes background,foreground --mask-values 7,9" in command
    quick = ["--distillation", "none", "--iterations", "1", "--batch", "2", "--dataset.image-size", "32", "32"]
    assert main([*shlex.split(command)[1:], *quick, "--output", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    config, _ = RunFolder(tmp_path / "run").read()
    assert (config.dataset.images, config.dataset.masks) == ("images", "truth/GT_{name}.png")


@pytest.mark.parametrize(
    ("values", "is_right"), [((0, 1, 2), False), ((0, 1), False), ((0, 255), True), ((255,), True)]
)
def test_one_jpeg_among_other_masks_does_not_decide_their_values(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str], values: tuple[int, ...], is_right: bool
) -> None:
    write_frames(tmp_path, write, np.resize(np.array(values, np.uint8), (48, 64)))
    (tmp_path / "masks/2.png").unlink()
    write(tmp_path / "masks/2.jpg", 255 * DISC)
    assert main(["data", "check", str(tmp_path)]) == (0 if is_right else 2)
    printed = capsys.readouterr().out
    assert ("--classes background,foreground --mask-values 0,255" in printed) == is_right
    held = (
        "1 masks have a lossy compression, which changes values, and the others hold "
        f"{', '.join(map(str, values))}; export them"
    )
    assert (held in printed) != is_right


@pytest.mark.parametrize(
    ("suffix", "options", "lossy"),
    [
        (".jpg", {}, 3),
        (".webp", {}, 3),
        (".tif", {"compression": "jpeg"}, 3),
        (".webp", {"lossless": True}, 0),
        (".tif", {"compression": "tiff_lzw"}, 0),
    ],
)
def test_masks_with_a_lossy_compression_are_those_that_training_takes_as_lossy(
    tmp_path: Path, write: Write, suffix: str, options: dict[str, Any], lossy: int
) -> None:
    write_frames(tmp_path, write, DISC, suffix=suffix)
    for number in range(3):
        Image.fromarray(255 * DISC).save(tmp_path / f"masks/{number}{suffix}", **options)
    found = survey(tmp_path)
    assert found.lossy == lossy
    assert found.mask_values == ("0", "255")
    assert found.is_lossy_black_and_white == bool(lossy)
    assert found.problems == []


def test_masks_of_turned_tiff_images_have_the_size_of_the_upright_image(tmp_path: Path, write: Write) -> None:
    exif = Image.Exif()
    (tmp_path / "images").mkdir()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        stored = np.full((48, 64, 3) if orientation < 5 else (64, 48, 3), orientation, np.uint8)
        Image.fromarray(stored).save(tmp_path / f"images/{orientation}.tif", exif=exif)
        write(tmp_path / f"masks/{orientation}.png", DISC)
    found = survey(tmp_path)
    assert found.problems == []
    assert dict(found.sizes) == {(48, 64): 8}
    assert found.turned == 7


def test_what_needs_a_look_is_counted(tmp_path: Path, write: Write) -> None:
    for split, number, value in (("train", 1, 9), ("train", 2, 8), ("val", 1, 7), ("val", 3, 9)):
        write(tmp_path / f"images/{split}/{number}.png", np.full((48, 64, 3), value, np.uint8))
        write(tmp_path / f"masks/{split}/{number}.png", DISC)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(tmp_path / "images/val/4.jpg", exif=exif)
    write(tmp_path / "masks/val/4.png", DISC)
    Image.fromarray(np.full((48, 64), 4000, np.uint16)).save(tmp_path / "images/val/5.png")
    write(tmp_path / "masks/val/5.png", DISC[:, 1:])
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    write(tmp_path / "images/val/6.jpg", noise)
    write(tmp_path / "masks/val/6.png", DISC)
    whole = (tmp_path / "images/val/6.jpg").read_bytes()
    (tmp_path / "images/val/6.jpg").write_bytes(whole[: len(whole) // 2])
    found = survey(tmp_path)
    assert found.frames == {"train": 2, "val": 5}
    assert found.duplicates == [("train/1", "val/3")]
    assert (found.turned, sum(found.wide.values()), found.highest) == (1, 1, 4000)
    size, damage = found.problems
    assert "got 63 x 48" in size
    assert "6.jpg: the file is damaged" in damage
    assert "--dataset.image-range 0 4095" in found.command
    assert "--split" not in found.command


def test_an_image_in_two_splits_is_found_under_its_own_name_too(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, number, value in (("train", 1, 9), ("train", 2, 9), ("val", 1, 9), ("val", 2, 8)):
        write(tmp_path / f"images/{split}/{number}.png", np.full((48, 64, 3), value, np.uint8))
        write(tmp_path / f"masks/{split}/{number}.png", DISC)
    # Copies within one split leak nothing.
    assert survey(tmp_path).duplicates == [("train/1", "val/1")]
    assert main(["data", "check", str(tmp_path)]) == 0
    assert "train/1 = val/1 have the same bytes; remove one of each" in capsys.readouterr().out


def test_the_white_of_1_bit_masks_is_that_of_the_others(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write_frames(tmp_path, write, 255 * DISC, count=10)
    Image.fromarray(DISC.astype(bool)).save(tmp_path / "masks/3.png")
    found = survey(tmp_path)
    assert (found.one_bit, found.values) == (1, {"0": 10 * (DISC == 0).sum(), "255": 10 * DISC.sum()})
    assert main(["data", "check", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "1-bit masks: 1 beside masks of 0 and 255; their white counts as 255" in printed
    command = shlex.split(printed.split("train with:  ")[1])
    values = command[command.index("--mask-values") + 1]
    dataset = data.build("folder", "all", train=False, root=tmp_path, folder_options=FolderOptions((), (values,)))
    assert all((sample.labels.numpy() == DISC).all() for sample in dataset)
    # Beside class indices a 1 is a 1.
    write_frames(tmp_path, write, DISC, count=10)
    Image.fromarray(DISC.astype(bool)).save(tmp_path / "masks/3.png")
    assert survey(tmp_path).mask_values == ()


def test_a_mask_that_may_be_upside_down_is_pointed_out(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write_frames(tmp_path, write, DISC, count=4)
    exif = Image.Exif()
    for number, (orientation, own) in enumerate([(3, False), (3, True), (6, False), (1, False)]):
        exif[0x0112] = orientation
        shape = (64, 48, 3) if orientation == 6 else (48, 64, 3)
        Image.fromarray(np.full(shape, number, np.uint8)).save(tmp_path / f"images/{number}.png", exif=exif)
        Image.fromarray(DISC).save(tmp_path / f"masks/{number}.png", **({"exif": exif} if own else {}))
    found = survey(tmp_path)
    assert found.problems == []
    # The size of the third mask says that it is upright.
    assert (found.turned, found.turned_alone) == (3, 1)
    main(["data", "check", str(tmp_path)])
    assert "1 of them have a mask without one; check in an image viewer that both" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "expected"),
    [((-1024, 3000), "-1024 3000"), ((7, 1234567), "0 1234567"), ((0.25, 0.75), "0 0.75")],
)
def test_the_suggested_range_holds_every_value(
    tmp_path: Path, write: Write, values: tuple[float, float], expected: str
) -> None:
    write_frames(tmp_path, write, DISC, count=1)
    pixels = np.full((48, 64), values[0], np.float32)
    pixels[3] = values[1]
    (tmp_path / "images/0.png").unlink()
    Image.fromarray(pixels).save(tmp_path / "images/0.tif")
    command = survey(tmp_path).command
    assert command.endswith(f"--dataset.image-range {expected}")
    low, high = map(float, expected.split())
    assert read_image(tmp_path / "images/0.tif", (low, high)).max() == 255


def test_16_bit_colour_gets_the_range_that_training_asks_for(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write_frames(tmp_path, write, DISC, count=10)
    for number in range(10):
        (tmp_path / f"images/{number}.png").write_bytes(wide_png(48, 64))
    assert main(["data", "check", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "10 images have more than 8 bits, up to 65535" in printed
    command = printed.split("train with:  ")[1].strip()
    assert command.endswith("--dataset.image-range 0 65535")
    quick = ["--distillation", "none", "--iterations", "1", "--batch", "2", "--dataset.image-size", "32", "32"]
    assert main([*shlex.split(command)[1:], *quick, "--output", str(tmp_path / "run")]) == 0, capsys.readouterr().err


def test_problems_are_printed_and_fail_the_command(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write_frames(tmp_path, write, np.zeros_like(DISC))
    assert main(["data", "check", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "problem:     the masks must have two values at least, got 0" in captured.out
    assert "must be free of problems, got 1" in captured.err
    write_frames(tmp_path, write, np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1)))
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "must have at most 32 values to suggest classes, got 64" in capsys.readouterr().out


def test_grey_between_black_and_white_is_pointed_out(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write_frames(tmp_path / "soft", write, SOFT)
    assert main(["data", "check", str(tmp_path / "soft")]) == 0
    share = np.isin(SOFT, [0, 255], invert=True).mean()
    assert f"grey:        {share:.2%} of the pixels lie between 0 and 255; 128 and above" in capsys.readouterr().out
    three = 255 * DISC
    three[:2] = 128
    write_frames(tmp_path / "three", write, three)
    assert main(["data", "check", str(tmp_path / "three")]) == 0
    printed = capsys.readouterr().out
    command = f"sward train own --data {tmp_path / 'three'} --classes background,foreground --mask-values 0-127,128-255"
    assert (
        "grey:        4.17% of the pixels lie between 0 and 255; if they are soft edges and not classes, train with: "
        f"{command} --split 80/10/10"
    ) in printed
    assert "--classes class0,class1,class2 --mask-values 0,128,255" in printed
    three[:20] = 128  # too much for edges
    write_frames(tmp_path / "three", write, three)
    assert main(["data", "check", str(tmp_path / "three")]) == 0
    assert "grey:" not in capsys.readouterr().out


def many_classes() -> np.ndarray:
    """Forty classes in 2 % of the pixels, one of them missing, and a border of 255."""
    mask = np.zeros((48, 64), np.uint8)
    mask[0], mask[20, :40] = 255, np.arange(1, 41)
    mask[20, 16] = 0
    return mask


@pytest.mark.parametrize(
    ("masks", "printed"),
    [
        ([np.pad(DISC[1:-1, 1:-1], 1, constant_values=255)], "--classes background,foreground --split"),
        (
            [many_classes()],
            "must have at most 32 values to suggest classes, got 41; name the classes' values with --mask-v",
        ),
        ([SOFT, DISC], "must have at most 32 values"),
        ([SOFT, DISC > 0], "must have at most 32 values"),
        ([SOFT, Image.fromarray(SOFT).quantize(256)], "must have at most 32 values"),
        ([np.stack([SOFT, 0 * SOFT, 0 * SOFT], -1)], "; name the classes' values with --mask-values\n"),
    ],
)
def test_what_only_looks_like_soft_edges(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str], masks: list[Any], printed: str
) -> None:
    """Indices with 255 to ignore, many classes, masks of other kinds beside soft ones, and colours."""
    for number in range(4):
        write(tmp_path / f"images/{number}.png", np.full((48, 64, 3), number, np.uint8))
        mask = masks[number % len(masks)]
        (tmp_path / "masks").mkdir(exist_ok=True)
        (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(tmp_path / f"masks/{number}.png")
    main(["data", "check", str(tmp_path)])
    found = capsys.readouterr().out
    assert printed in found
    assert "grey:" not in found
    assert "--mask-values 0-127,128-255" not in found


def test_soft_masks_train_by_the_command_that_is_printed(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write_frames(tmp_path, write, SOFT, count=10)
    assert main(["data", "check", str(tmp_path)]) == 0
    command = capsys.readouterr().out.split("train with:  ")[1].strip()
    quick = ["--distillation", "none", "--iterations", "1", "--batch", "2", "--dataset.image-size", "32", "32"]
    assert main([*shlex.split(command)[1:], *quick, "--output", str(tmp_path / "run")]) == 0, capsys.readouterr().err


def test_runs_are_counted_like_pixels() -> None:
    values = np.random.default_rng(0).integers(0, 4, (30, 40)).repeat(3, 1)
    for counted, expected in zip(count_values(values), np.unique(values, return_counts=True)):
        assert counted.tolist() == expected.tolist()


def test_files_that_cannot_be_read_are_listed(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_frames(tmp_path, write, DISC, count=4)
    Image.fromarray(np.full((48, 64), np.inf, np.float32)).save(tmp_path / "images/0.tif")
    (tmp_path / "images/0.png").unlink()
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 60), np.uint8).reshape(48, 1280, 3)
    write(tmp_path / "images/1.png", noise)
    whole = (tmp_path / "images/1.png").read_bytes()
    second = whole.index(b"IDAT", whole.index(b"IDAT") + 1)
    (tmp_path / "images/1.png").write_bytes(whole[:second] + bytes([1, 2, 3, 4]) + whole[second + 4 :])
    Image.new("RGB", (1280, 480)).save(tmp_path / "images/2.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1280 * 48)
    assert main(["data", "check", str(tmp_path)]) != 0
    said = "".join(capsys.readouterr())
    assert f"{tmp_path}/images/0.tif must hold finite numbers only" in said
    assert f"{tmp_path}/images/1.png" in said
    assert f"{tmp_path}/images/2.png" in said


def test_a_coloured_mask_without_an_object_is_black(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write_frames(tmp_path, write, np.stack([200 * DISC, 0 * DISC, 0 * DISC], -1))
    write(tmp_path / "masks/1.png", np.zeros((48, 64, 3), np.uint8))
    assert main(["data", "check", str(tmp_path)]) == 0
    assert "--classes background,foreground --mask-values '#000000,#c80000'" in capsys.readouterr().out
    Image.fromarray(np.full((48, 64), 300, np.uint16)).save(tmp_path / "masks/2.png")
    assert main(["data", "check", str(tmp_path)]) == 2
    assert f"mask {tmp_path}/masks/2.png must have colours" in "".join(capsys.readouterr())
