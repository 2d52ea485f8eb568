"""The distiller: one module that trains the student, keeps the teacher out of the way, and says what is wrong."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sward
from sward import Distiller, methods
from sward.config import TapConfig
from sward.features import FeatureTaps
from sward.losses import DistillationInputs, ReceptiveTokens, SegmentationCrossEntropy, save_masks
from sward.losses.freekd import FrequencyPrompts
from tests.support.token_network import TokenNetwork


class Net(nn.Module):
    """An encoder of strides 2, 4, 8 and 16, and a classifier."""

    def __init__(self, width: int, classes: int = 3, wrap: Any = None) -> None:
        super().__init__()
        sides = [3, width, 2 * width, 3 * width, 4 * width]
        self.encoder = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(sides)
        )
        self.head = nn.Conv2d(sides[-1], classes, 1)
        self.wrap = wrap

    def forward(self, images: Tensor) -> Any:
        maps = images
        for stage in self.encoder:
            maps = stage(maps)
        logits = self.head(maps)
        return logits if self.wrap is None else self.wrap(logits)


class InPlace(Net):
    """Its activations overwrite the batch norms' output."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        for stage in self.encoder:
            stage[2].inplace = True


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))


def distiller(**options: Any) -> Distiller:
    small = {"window_size": (4,), "embed_dim": 8} if options.get("method", "sward") == "sward" else {}
    return Distiller(Net(4), Net(8), **{"num_classes": 3, "image_size": (64, 64), **small, **options})


def test_loss_is_the_task_loss_plus_the_methods_on_the_same_maps() -> None:
    made, (images, labels) = distiller().eval(), batch()
    output = made(images, labels)
    with FeatureTaps(made.student, made.student_layers) as own, FeatureTaps(made.teacher, made.teacher_layers) as other:
        logits = nn.functional.interpolate(made.student(images), (64, 64), mode="bilinear", align_corners=False)
        made.teacher(images)
        relations = made.distillation.forward(DistillationInputs(own.collect(), other.collect(), labels))
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.loss, SegmentationCrossEntropy()(logits, labels) + relations.loss)
    torch.testing.assert_close(output.terms["task"], SegmentationCrossEntropy()(logits, labels).detach())
    assert made.student_layers == made.teacher_layers == tuple(f"encoder.{stage}" for stage in range(4))


def test_one_number_is_the_window_of_every_stage() -> None:
    made = distiller(window_size=2)
    assert made.distillation.mwad.window_size == (2, 2, 2, 2)
    made(*batch()).backward()


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_gives_the_student_a_gradient(method: str, tmp_path: Any) -> None:
    student, teacher = Net(4), Net(8)
    options: dict[str, Any] = {}
    if method in ("maskd", "freekd"):
        tap = "logits" if method == "maskd" else "encoder.3"
        masks = ReceptiveTokens(3) if method == "maskd" else FrequencyPrompts.preset("released", 32)
        save_masks(tmp_path / "masks.pt", masks, teacher, tap)
        options["masks"] = tmp_path / "masks.pt"
    made = Distiller(student, teacher, num_classes=3, method=method, image_size=(64, 64), **options)
    output = made(*batch())
    output.backward()
    assert torch.isfinite(output.loss)
    assert student.encoder[0][0].weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("method", ["fitnet", "cirkd", "cwd", "freekd", "maskd"])
def test_maps_of_64_bits_are_compared_in_the_dtype_of_what_the_method_learns(method: str, tmp_path: Any) -> None:
    student, teacher = Net(4), Net(8)
    tap = "logits" if method == "maskd" else "encoder.3"
    options: dict[str, Any] = {}
    if method in ("maskd", "freekd"):
        masks = ReceptiveTokens(3) if method == "maskd" else FrequencyPrompts.preset("released", 32)
        save_masks(tmp_path / "masks.pt", masks, teacher, tap)
        options["masks"] = tmp_path / "masks.pt"
    made = Distiller(student, teacher, num_classes=3, method=method, image_size=(64, 64), **options)
    made.student.double()
    made.teacher.double()
    images, labels = batch()
    made(images.double(), labels).backward()
    assert student.encoder[0][0].weight.grad.dtype == torch.float64
    assert student.encoder[0][0].weight.grad.abs().sum() > 0


def test_the_teacher_is_no_part_of_the_module_but_follows_its_device_and_stays_in_eval_mode() -> None:
    made = distiller()
    learned = {id(parameter) for parameter in made.parameters()}
    assert not learned & {id(parameter) for parameter in made.teacher.parameters()}
    assert {id(parameter) for parameter in made.student.parameters()} < learned
    assert not any("teacher." in key for key in made.state_dict() if not key.startswith("distillation."))
    made.teacher.train()
    made.train()
    before = made.teacher.encoder[0][1].num_batches_tracked.clone()
    made(*batch())
    assert made.teacher.encoder[0][1].num_batches_tracked == before
    made.double()
    assert next(made.teacher.parameters()).dtype == torch.float64


def test_without_labels_it_distils_only() -> None:
    made, (images, _) = distiller(), batch()
    output = made(images)
    assert "task" not in output.terms
    assert output.logits.shape == (2, 3, 4, 4)
    output.backward()
    # As `DistributedDataParallel` needs it.
    assert made.student.head.weight.grad.abs().sum() == 0
    with pytest.raises(ValueError, match="labels must be given for method 'cirkd'"):
        distiller(method="cirkd")(images)


def test_without_labels_kd_compares_every_pixel_whatever_the_ignored_label() -> None:
    student, teacher, (images, _) = Net(4), Net(8), batch()
    losses = [
        Distiller(student, teacher, num_classes=3, method="kd", image_size=(64, 64), ignore_index=ignored).eval()(
            images
        )
        for ignored in (0, 255)
    ]
    assert losses[0].loss == losses[1].loss > 0


@pytest.mark.parametrize("unlabelled", [False, True])
def test_kd_learns_from_images_without_labels_if_told_that_there_are_some(unlabelled: bool) -> None:
    made, (images, labels) = distiller(method="kd", unlabelled=unlabelled).eval(), batch()
    labels[1] = 255
    others = torch.cat([images[:1], torch.randn_like(images[1:])])
    first, second = (made(each, labels) for each in (images, others))
    assert first.terms["task"] == second.terms["task"]
    assert (first.terms["kd"] != second.terms["kd"]) == unlabelled


def test_without_labels_sward_leaves_out_pdr() -> None:
    made, (images, labels) = distiller(recipe="paper").eval(), batch()
    without, labelled = made(images), made(images, labels)
    assert labelled.terms["pdr"] > 0
    assert without.terms["pdr"] == 0
    torch.testing.assert_close(without.loss, 2 * labelled.terms["mwad"])
    without.backward()
    assert all(parameter.grad.isfinite().all() for parameter in made.student.encoder.parameters())


def test_outputs_that_no_shape_explains_are_read_as_told() -> None:
    student, teacher, (images, labels) = Net(4), TokenNetwork(3), batch()
    options: dict[str, Any] = {"num_classes": 3, "image_size": (64, 64), "window_size": (4,), "embed_dim": 8}
    layers: dict[str, Any] = {"student_layers": ["encoder.3"], "teacher_layers": ["encoder.2"]}
    with pytest.raises(ValueError, match="prefix_tokens"):
        Distiller(student, teacher, **layers, **options)
    told = TapConfig("tokens", prefix_tokens=11, select="tokens")
    made = Distiller(student, teacher, teacher_taps=told, **layers, **options).eval()
    loss = made(images, labels).loss
    with FeatureTaps(teacher, ["encoder.2"], **told.arguments()) as taps:
        teacher(images)
        maps = taps.collect()["encoder.2"]
    with torch.no_grad():
        expected = teacher.encoder[2](teacher.encoder[1](_tokens(teacher, images))["tokens"])["tokens"]
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), expected[:, 11:])
    made.teacher.encoder[2].linear.bias.data[0] += 1
    assert made(images, labels).loss != loss


def _tokens(teacher: TokenNetwork, images: Tensor) -> Tensor:
    patches = teacher.encoder[0](images).flatten(2).transpose(1, 2)
    return torch.cat([patches.new_zeros(len(patches), 11, 8), patches], 1)


def test_copies_and_pickles_distil_on_their_own() -> None:
    made, (images, labels) = distiller().eval(), batch()
    expected = made(images, labels).loss
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        torch.testing.assert_close(other(images, labels).loss, expected)
        with torch.no_grad():
            other.student.head.weight.zero_()
        assert other(images, labels).loss != expected
        torch.testing.assert_close(made(images, labels).loss, expected)


def test_dictionaries_and_teacher_images_of_another_size() -> None:
    student = Net(4, wrap=lambda logits: {"out": logits, "aux": 0 * logits})
    made = Distiller(student, Net(8), num_classes=3, image_size=(64, 64), method="kd")
    images, labels = batch()
    assert made(images, labels, teacher_images=torch.randn(2, 3, 128, 128)).logits.shape == (2, 3, 64, 64)


def test_importing_the_package_or_its_losses_does_not_import_the_distiller() -> None:
    code = "import sys, sward, sward.losses; print('sward.distiller' in sys.modules, 'sward.training' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2
    assert {"Distiller", "DistillerOutput", "load"} == set(sward.__all__)


def test_compiled_networks_and_a_compiled_distiller_have_the_losses_of_the_others() -> None:
    student, teacher, (images, labels) = Net(4), Net(8), batch()
    # A map of 8 channels at 8x8 positions reads in two ways, which a second pass settles.
    options = {"student_layers": ["encoder.2", "encoder.3"], "teacher_layers": ["encoder.2", "encoder.3"]}
    options |= {"num_classes": 3, "image_size": (64, 64), "window_size": 4, "embed_dim": 8, "shift": "none"}

    def loss(*networks: nn.Module, whole: bool = False) -> Tensor:
        torch.manual_seed(0)
        made = Distiller(*networks, **options).eval()
        called = torch.compile(made, backend="eager") if whole else made
        found = called(images, labels).loss
        made.close()
        return found

    expected = loss(student, teacher)
    compiled = [torch.compile(network, backend="eager") for network in (student, teacher)]
    torch.testing.assert_close(loss(*compiled), expected)
    torch.testing.assert_close(loss(student, teacher, whole=True), expected)


def test_a_closed_distiller_leaves_no_hook_behind() -> None:
    made = distiller()
    made(*batch()).backward()
    made.close()
    for network in (made.student, made.teacher):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    made.student(batch()[0])


def test_one_overflow_of_the_teacher_spoils_one_step() -> None:
    """As a loss scaler needs it, which skips such a step."""
    made, (images, labels) = distiller(), batch()

    def is_finite(factor: float) -> bool:
        with made.teacher.encoder[2].register_forward_hook(lambda *call: call[-1] * factor):
            return bool(made(images, labels).loss.isfinite())

    assert [is_finite(factor) for factor in (1, torch.inf, 1, 1)] == [True, False, True, True]


SAME = Net(4)
WRONG: dict[str, tuple[Any, str]] = {
    "unknown method": (lambda: distiller(method="swrd"), "unknown distillation method 'swrd'; did you mean 'sward'"),
    "unknown recipe": (lambda: distiller(recipe="best"), "recipe must be one of 'recommended', 'paper', got 'best'"),
    "setting of sward": (
        lambda: distiller(method="cirkd", terms=(0.0, 0.0, 0.0, 1.0)),
        r"settings must be none for method 'cirkd', got terms=\(0\.0, 0\.0, 0\.0, 1\.0\); they are those of 'sward'",
    ),
    "recipe of sward": (
        lambda: distiller(method="kd", recipe="paper"),
        "recipe must be 'recommended' for method 'kd', which has none, got 'paper'",
    ),
    "masks of another method": (
        lambda: distiller(method="cwd", masks="m.pt"),
        "masks must be None for method 'cwd', got 'm.pt'",
    ),
    "unknown setting": (lambda: distiller(window=4), "settings must be fields of SWARDConfig, got 'window'"),
    "one class": (
        lambda: Distiller(Net(4, 1), Net(8, 1), num_classes=1, image_size=(64, 64)),
        r"num_classes must be at least 2 \(a one-logit task has 2\), got 1",
    ),
    "one logit and three classes": (
        lambda: Distiller(Net(4, 1), Net(8, 1), num_classes=3, image_size=(64, 64)),
        "num_classes must be 2, as the student has one logit, got 3",
    ),
    "other classes": (lambda: distiller(num_classes=19), "num_classes must be 3, the channels of .* got 19"),
    "misnamed layer": (
        lambda: distiller(student_layers=["encoder.7"]),
        r"student_layer 'encoder.7' does not exist in Net; did you mean",
    ),
    "one string": (
        lambda: distiller(teacher_layers="encoder.1"),
        "teacher_layers must be a list of at least one layer",
    ),
    "no layer": (lambda: distiller(student_layers=[]), "student_layers must be a list of at least one layer"),
    "layer of the other network": (
        lambda: Distiller(Net(4), nn.Sequential(Net(8)), num_classes=3, teacher_layers=["encoder.1"]),
        "it exists in the other network, and the student comes first",
    ),
    "not as many layers": (
        lambda: distiller(student_layers=["encoder.1"], teacher_layers=["encoder.1", "encoder.2"]),
        "teacher_layers must be as many as student_layers, 1, got 2",
    ),
    "more layers than the teacher has stages": (
        lambda: distiller(student_layers=[f"encoder.{stage}" for stage in range(4)] + ["head"]),
        r"teacher_layers must be named too, 5 as for the other network, got none; the teacher has 4 stages of its own",
    ),
    "labels of another aspect": (
        lambda: distiller()(torch.randn(2, 3, 96, 64), torch.zeros(2, 64, 96, dtype=torch.long)),
        r"labels must have the aspect ratio of the images, 96x64, got 64x96",
    ),
    "window of a fraction": (
        lambda: distiller(window_size=4.0),
        "window_size must be a whole number or a list of them",
    ),
    "probabilities": (
        lambda: Distiller(Net(4, wrap=lambda x: x.softmax(1)), Net(8), num_classes=3, image_size=(64, 64)),
        "student must return logits, got probabilities; leave out its softmax",
    ),
    "a teacher's probabilities": (
        lambda: Distiller(Net(4), Net(8, wrap=lambda x: x.softmax(1)), num_classes=3, method="cirkd"),
        "teacher must return logits, got probabilities; leave out its softmax",
    ),
    "teacher of other classes": (
        lambda: Distiller(Net(4), Net(8, 5), num_classes=3, method="kd"),
        "teacher must return 3 logits, one per class as num_classes says, got 5",
    ),
    "layers of a method on logits": (
        lambda: distiller(method="cwd", student_layers=["encoder.2"]),
        r"student_layers must be None for method 'cwd', which compares logits only, got \['encoder.2'\]",
    ),
    "layers of a method on one": (
        lambda: distiller(method="cirkd", teacher_layers=["encoder.1", "encoder.2"]),
        r"teacher_layers must be a single one for method 'cirkd', which compares one pair of layers, got \['enc",
    ),
    "teacher's layer that is overwritten": (
        lambda: Distiller(Net(4), InPlace(8), num_classes=3, method="at", teacher_layers=["encoder.2.1"]),
        r"overwritten in place; tap the layer that overwrites it, probably 'encoder.2.2'",
    ),
    "one number as weights": (lambda: distiller(weights=2.0), "weights must be 2 finite numbers of .* got 2.0"),
    "complex weights": (lambda: distiller(weights=(1j, 0)), r"weights must be 2 finite numbers of .* got \(1j, 0\)"),
    "images of bytes": (
        lambda: distiller()(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)),
        r"images must be floating-point numbers, as the networks were trained on, got torch.uint8",
    ),
    "channels last": (lambda: distiller()(torch.randn(2, 64, 64, 3)), r"images must be \[B, 3, H, W\], got 2x64x64x3"),
    "one image": (lambda: distiller()(torch.randn(3, 64, 64)), r"images must be \[B, 3, H, W\], got 3x64x64"),
    "teacher images of bytes": (
        lambda: distiller()(torch.randn(2, 3, 64, 64), teacher_images=torch.zeros(2, 3, 64, 64).byte()),
        r"teacher_images must be floating-point",
    ),
    "same network": (lambda: Distiller(SAME, SAME, num_classes=3), "teacher must be another network"),
    "shared parameters": (
        lambda: Distiller(SAME, nn.Sequential(SAME), num_classes=3),
        "teacher must share no parameters with the student",
    ),
    "frozen student": (
        lambda: Distiller(Net(4).requires_grad_(False), Net(8), num_classes=3),
        "student must have parameters that require gradients",
    ),
    "no module": (lambda: Distiller(Net(4), Net, num_classes=3), "teacher must be an nn.Module, got type"),
    "masks missing": (lambda: distiller(method="maskd"), "masks must be a file for method 'maskd', got None"),
    "image size": (lambda: distiller(image_size=(0, 0)), r"student: image_size must be .* got 0x0.*; pass image_size="),
    "one number as image size": (lambda: distiller(image_size=64), r"image_size must be \(height, width\), got 64"),
    "taps as a dictionary": (
        lambda: distiller(teacher_taps={"format": "nhwc"}),
        r"teacher_taps must be a sward.config.TapConfig, got \{'format'",
    ),
    "dictionary without logits": (
        lambda: Distiller(Net(4, wrap=lambda x: {"a": x, "b": x}), Net(8), num_classes=3, image_size=(64, 64)),
        r"select must name a tensor in the output of the student, got 0; it holds \{'a'",
    ),
    "labels of floats": (lambda: distiller()(batch()[0], torch.zeros(2, 64, 64)), "labels must have an integer dtype"),
    "labels with a channel": (
        lambda: distiller()(batch()[0], torch.zeros(2, 1, 64, 64, dtype=torch.long)),
        r"labels must be \[B, H, W\]",
    ),
    "one channel of image": (
        lambda: distiller()(torch.randn(2, 1, 64, 64)),
        r"images must be \[B, 3, H, W\], got 2x1x64x64",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_uses_end_in_one_sentence(case: str) -> None:
    wrong, message = WRONG[case]
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)


def test_swapped_networks_are_noticed() -> None:
    with pytest.warns(UserWarning, match="the teacher has fewer parameters than the student"):
        Distiller(Net(8), Net(4), num_classes=3, image_size=(64, 64))


@pytest.mark.parametrize(("method", "other", "tap"), [("maskd", "freekd", "logits"), ("freekd", "maskd", "encoder.3")])
def test_masks_of_the_other_kind_are_refused(method: str, other: str, tap: str, tmp_path: Any) -> None:
    student, teacher, path = Net(4), Net(8), tmp_path / "masks.pt"
    masks = FrequencyPrompts.preset("released", 3) if other == "freekd" else ReceptiveTokens(32)
    save_masks(path, masks, teacher, tap)
    wanted = "ReceptiveTokens" if method == "maskd" else "FrequencyPrompts"
    with pytest.raises(ValueError, match=f"masks must be a file with {wanted} at '{tap}', got {type(masks).__name__}"):
        Distiller(student, teacher, num_classes=3, method=method, masks=path, image_size=(64, 64))
