"""What exported files hold, what they take and return, and which networks cannot be exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sward
from sward.data import IMAGENET_MEAN, normalise
from sward.deploy.export import write_network
from sward.deploy.metadata import Metadata
from sward.deploy.network import DeployedNetwork
from sward.deploy.predictor import Predictor
from sward.models.inputs import Statistics
from sward.models.segmenter import Segmenter
from tests.support.exported import CLASSES, metadata, padded_by_hand, photos


def test_networks_that_are_not_registered_are_written_too(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, len(CLASSES), 1)).eval()
    write_network(network, metadata("package.module:function"), tmp_path / "student.pt2")
    images = photos(2, 40, 50)
    found = sward.load(tmp_path / "student.pt2").forward(images)
    torch.testing.assert_close(found, padded_by_hand(network, images), atol=1e-4, rtol=0)


def test_a_teacher_needs_a_fixed_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"network hiera_demo must be exported with a fixed size.*--size HEIGHT WIDTH"):
        write_network(Pixelwise(), metadata("hiera_demo"), tmp_path / "teacher.onnx")


class SizeDependent(nn.Module):
    """Padding by a rule that looks at the size, as TensorFlow's 'same' padding does."""

    def forward(self, images: Tensor) -> Tensor:
        width = images.shape[-1]
        return images if width % 3 == 0 else nn.functional.pad(images, (0, width % 3))[..., :width] * 2


def test_a_network_that_needs_a_fixed_size_is_named_with_the_remedy(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "student.pt2"
    found = (
        r"^network package:net cannot be exported for any batch and size: .*width.*; try a fixed size, --size [A-Z ]+$"
    )
    with pytest.raises(ValueError, match=found):
        write_network(SizeDependent(), metadata("package:net"), path)
    assert not path.exists()
    assert capfd.readouterr().err == ""
    write_network(SizeDependent(), metadata("package:net", fixed_size=(64, 64)), path)
    images = photos(1, 64, 64)
    assert torch.equal(sward.load(path).forward(images), padded_by_hand(SizeDependent(), images))


class BatchDependent(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images * 2 if images.shape[0] == 2 else images


class WithoutONNX(nn.Module):
    """Uses an operation that ONNX does not have."""

    def forward(self, images: Tensor) -> Tensor:
        return images * torch.linalg.eigvals(images.new_ones(2, 2)).abs().sum()


@pytest.mark.parametrize(
    ("network", "suffix", "message"),
    [
        (BatchDependent(), ".pt2", r"^network package:net cannot be exported for any batch: .*batch.*$"),
        (WithoutONNX(), ".onnx", r"^network package:net cannot be written as ONNX: .*; try a .pt2 file$"),
    ],
)
def test_what_torch_cannot_export_is_said_in_one_line(
    network: nn.Module, suffix: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_network(network, metadata("package:net", fixed_size=(64, 64)), tmp_path / f"student{suffix}")
    assert list(tmp_path.iterdir()) == []


class Pixelwise(nn.Module):
    """A network without context: exports in a moment, and its logits are known by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(3, len(CLASSES), 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(images)


@pytest.mark.parametrize(
    ("input", "output"),
    # Neither depends on the other: every input once, and every output once.
    [
        *((input, "logits") for input in ("uint8", "float", "normalised")),
        *(("uint8", output) for output in ("probabilities", "argmax")),
    ],
)
def test_inputs_and_outputs(input: Any, output: Any, tmp_path: Path) -> None:
    import onnxruntime

    network = Pixelwise().eval()
    write_network(network, metadata(input=input, output=output), tmp_path / "file.onnx")
    images = photos(2, 40, 50)
    given = {"uint8": images, "float": images / 255, "normalised": normalise(images)}[input]
    logits = network(normalise(images)).detach()
    expected = {"logits": logits, "probabilities": logits.softmax(1), "argmax": logits.argmax(1).to(torch.uint8)}
    session = onnxruntime.InferenceSession(tmp_path / "file.onnx")
    (found,) = session.run(["classes" if output == "argmax" else output], {"images": given.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected[output], atol=1e-5, rtol=0)


@pytest.mark.parametrize("output", ["logits", "probabilities", "argmax"])
def test_a_network_of_one_logit_has_two_classes(output: Any) -> None:
    network = nn.Conv2d(3, 1, 1).eval()
    nn.init.zeros_(network.weight)
    one_logit = Metadata("mine:build", "scenes", ("a", "b"), ((0, 0, 0), (9, 9, 9)), (32, 32), output=output)
    for logit, probability in ((-1.0, 0.268941), (2.0, 0.880797)):
        nn.init.constant_(network.bias, logit)
        predictor = Predictor(DeployedNetwork(network, output=output), one_logit, Path("file.onnx"))
        image = photos(1, 32, 32)[0]
        assert (predictor.predict(image) == (logit > 0)).all()
        if output != "argmax":
            expected = torch.tensor([1 - probability, probability])[:, None, None].expand(2, 32, 32)
            torch.testing.assert_close(torch.from_numpy(predictor.probabilities(image)), expected)


def test_onnx_file_describes_itself(tmp_path: Path) -> None:
    import onnx

    write_network(Pixelwise(), metadata(source="runs/x/best.pt"), tmp_path / "file.onnx")
    model = onnx.load(tmp_path / "file.onnx")
    onnx.checker.check_model(model)
    assert [each.version for each in model.opset_import if each.domain == ""] == [18]
    stored = {each.key: json.loads(each.value) for each in model.metadata_props}
    assert stored["sward.classes"] == list(CLASSES)
    assert stored["sward.palette"] == [[0, 0, 0], [255, 0, 0], [0, 255, 0]]
    assert stored["sward.mean"] == [0.485, 0.456, 0.406]
    assert stored["sward.image_size"] == [64, 64]
    assert stored["sward.opset"] == 18
    assert stored["sward.source"] == "runs/x/best.pt"
    assert stored["sward.version"] == sward.__version__
    sizes = [each.dim_param or each.dim_value for each in model.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, "height", "width"]
    assert sward.load(tmp_path / "file.onnx").metadata == metadata(source="runs/x/best.pt", opset=18)


def test_the_network_given_is_left_as_it_is() -> None:
    network = Pixelwise().train()
    DeployedNetwork(network)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not network.classifier._forward_pre_hooks


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    import onnx

    with pytest.raises(FileNotFoundError, match="there is no exported network"):
        sward.load(tmp_path / "absent.onnx")
    (tmp_path / "noise.onnx").write_bytes(b"noise")
    with pytest.raises(ValueError, match="must be an ONNX file"):
        sward.load(tmp_path / "noise.onnx")
    write_network(Pixelwise(), metadata(), tmp_path / "file.onnx")
    model = onnx.load(tmp_path / "file.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match=r"foreign.onnx must be written by 'sward export'"):
        sward.load(tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match=r"output must end in .onnx or .pt2, got .*file.tflite"):
        write_network(Pixelwise(), metadata(), tmp_path / "file.tflite")


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_files_renormalise_for_weights_that_expect_other_statistics(suffix: str, tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, len(CLASSES), 1))
    network = Segmenter(layers).eval()
    network.expect(Statistics((0.5,) * 3, (0.25,) * 3))
    write_network(network, metadata("timm:test_vit"), tmp_path / f"student{suffix}")
    # Sizes that need no padding, so that the contract is one line.
    images = photos(2, 64, 96)
    with torch.no_grad():
        expected = layers((images.float() / 255 - 0.5) / 0.25)
    found = sward.load(tmp_path / f"student{suffix}").forward(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # Files for normalised input take ImageNet's statistics, as they say.
    write_network(network, metadata("timm:test_vit", input="normalised"), tmp_path / f"student{suffix}")
    predictor = sward.load(tmp_path / f"student{suffix}")
    assert predictor.metadata.mean == IMAGENET_MEAN
    torch.testing.assert_close(predictor.forward(images), expected, atol=1e-5, rtol=0)
