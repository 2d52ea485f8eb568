"""`sward export` and its proof, on a run with a small network."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import sward
from sward.cli.main import main
from sward.cli.printing import print_export
from sward.config import TrainingConfig
from sward.data import normalise
from sward.deploy import proof
from sward.deploy.predictor import Predictor
from sward.deploy.proof import LabelledImages, ProofError, export_run
from sward.training import checkpoints
from tests.support.deployable import Pixelwise, make_run, register

pytestmark = pytest.mark.usefixtures("few_images")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    register(monkeypatch)
    monkeypatch.setattr(proof, "TIMED_SECONDS", 0.01)
    make_run(tmp_path / "run")
    return tmp_path / "run"


def test_export_writes_the_file_and_its_proof(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made" / "student.onnx"
    assert main(["export", str(run), "-o", str(path), "--check", "3"]) == 0
    printed = capsys.readouterr().out
    assert "pixelwise, ONNX, opset 18, fp32: uint8 RGB of any size -> logits" in printed
    assert f"written: {path} " in printed
    record = json.loads((tmp_path / "made" / "student.onnx.json").read_text())
    assert record["metadata"]["source"] == str(run.resolve() / "checkpoints" / "best.pt")
    found = record["proof"]
    assert (found["images"], found["split"]) == (3, "val")
    assert 0 <= found["largest_difference"] < 1e-4
    assert found["differing_pixels"] == 0
    assert found["mean_iou"] == found["mean_iou_pytorch"] > 0
    assert found["bytes"] == path.stat().st_size
    assert found["threads"] == torch.get_num_threads()
    assert found["milliseconds"] > 0


def test_scores_of_the_proof_are_those_of_evaluate(run: Path, tmp_path: Path) -> None:
    assert main(["evaluate", str(run)]) == 0
    scores = json.loads((run / "evaluation-scenes-val.json").read_text())
    found = export_run(run, tmp_path / "student.pt2").proof
    assert found is not None
    assert found.images == scores["images"] == 4
    assert found.mean_iou == pytest.approx(scores["mean_iou"], abs=1e-9)


@pytest.mark.parametrize("options", [{"output": "argmax"}, {"output": "probabilities"}, {"size": (16, 16)}])
def test_a_proof_also_has_the_score_of_evaluate_where_the_file_does_not_reach_it(
    run: Path, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Classes are resized otherwise than logits, and a file of another size sees other images."""
    assert main(["evaluate", str(run)]) == 0
    scores = json.loads((run / "evaluation-scenes-val.json").read_text())
    exported = export_run(run, tmp_path / "student.pt2", **options)
    found = exported.proof
    assert found is not None
    assert found.failure is None
    assert found.mean_iou_evaluated == pytest.approx(scores["mean_iou"], abs=1e-9)
    capsys.readouterr()
    print_export(replace(exported, proof=replace(found, mean_iou_evaluated=0.5, mean_iou_pytorch=0.4)))
    assert "as 'sward evaluate' scores: mIoU 50.00 %" in capsys.readouterr().out


def test_outputs_that_are_no_numbers_fail_the_proof(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Predictor, images: Tensor) -> Tensor:
        outputs = real(self, images)
        outputs[..., 0, 0] = torch.nan
        return outputs

    real = Predictor.forward
    monkeypatch.setattr(Predictor, "forward", forward)
    with pytest.raises(ProofError, match=r"outputs of the file must be finite .* got infinity or nan"):
        export_run(run, tmp_path / "student.pt2")
    record = json.loads((tmp_path / "student.pt2.failed.json").read_text())
    assert record["proof"]["largest_difference"] is None


def test_the_proof_is_made_on_the_split_that_the_run_has_drawn(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "split.csv").write_text("frame_id,split\n")

    def images(config: TrainingConfig, split: str, count: int | None) -> LabelledImages:
        raise ValueError(f"{split} of {config.dataset.split_by} in {config.dataset.root}")

    monkeypatch.setattr(proof, "evaluation_images", images)
    with pytest.raises(ValueError, match=f"test of {run}/split.csv in {tmp_path}"):
        export_run(run, tmp_path / "student.onnx", split="test", root=tmp_path)


def test_another_network_in_the_file_fails_the_proof(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_network = proof.export.write_network

    def wrong_bias(network: Pixelwise, metadata: object, path: Path) -> object:
        written = write_network(network, metadata, path)
        model = onnx.load(path)
        (bias,) = [each for each in model.graph.initializer if each.name.endswith("classifier.bias")]
        values = numpy_helper.to_array(bias).copy()
        values[1] += 5
        bias.CopyFrom(numpy_helper.from_array(values, bias.name))
        onnx.save(model, path)
        return written

    monkeypatch.setattr(proof.export, "write_network", wrong_bias)
    path = tmp_path / "student.onnx"
    assert main(["export", str(run), "-o", str(path)]) == 2
    assert "mIoU of the file must be within 0.01 points of" in capsys.readouterr().err
    assert not path.exists()
    assert not path.with_name("student.onnx.json").exists()
    found = json.loads(path.with_name("student.onnx.failed.json").read_text())["proof"]
    assert found["largest_difference"] == pytest.approx(5, abs=1e-3)
    assert found["differing_pixels"] > 0.05


def test_an_export_that_fails_leaves_an_older_file_and_its_proof(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "made"
    path = folder / "student.pt2"
    export_run(run, path, check=1)
    prove = proof.prove

    def contents() -> dict[str, bytes]:
        return {each.name: each.read_bytes() for each in folder.iterdir()}

    def broken(*arguments: object, **options: object) -> None:
        raise ValueError("cannot read the image")

    before = contents()
    assert set(before) == {"student.pt2", "student.pt2.json"}
    monkeypatch.setattr(proof, "prove", broken)
    with pytest.raises(ValueError, match="cannot read the image"):
        export_run(run, path, check=1, output="argmax", overwrite=True)
    assert contents() == before
    monkeypatch.setattr(proof.int8, "quantise", broken)
    with pytest.raises(ValueError, match="cannot read the image"):
        export_run(run, folder / "student.onnx", check=1, precision="int8", calibrate=1)
    assert contents() == before
    monkeypatch.setattr(proof, "prove", lambda *arguments, **options: replace(prove(*arguments, **options), mean_iou=0))
    with pytest.raises(ProofError, match=r"see .*student.pt2.failed.json"):
        export_run(run, path, check=1, output="argmax", overwrite=True)
    assert set(contents()) == {*before, "student.pt2.failed.json"}
    assert {name: contents()[name] for name in before} == before
    # The next one that succeeds replaces all, and the card of the old file goes.
    monkeypatch.setattr(proof, "prove", prove)
    (folder / "student.pt2.md").write_text("the card of the old file")
    export_run(run, path, check=1, output="argmax", overwrite=True)
    assert set(contents()) == set(before)
    assert sward.load(path).metadata.output == "argmax"
    assert json.loads(contents()["student.pt2.json"])["metadata"]["output"] == "argmax"


def test_a_loss_in_dice_alone_fails_the_proof(run: Path, tmp_path: Path) -> None:
    found = export_run(run, tmp_path / "student.onnx", check=1).proof
    assert found is not None
    assert found.failure is None
    worse = replace(found, dice=0.8, dice_pytorch=0.81, tolerance=0.005)
    assert worse.failure == "Dice of the file must be within 0.5 points of 81.00 %, got 80.00 %"
    assert replace(worse, tolerance=0.02).failure is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["-o", "student.onnx"], "output must not exist yet, got student.onnx; replace it with --overwrite"),
        (["-o", "student.tflite"], "output must end in .onnx or .pt2, got student.tflite"),
        (["-o", "new.onnx", "--check", "-1"], "check must be at least 0, got -1"),
        (["-o", "new.onnx", "--tolerance", "-1"], "tolerance must be at least 0, got -1.0"),
        (["-o", "new.onnx", "--split", "nowhere"], "nowhere"),
        (["-o", "new.onnx", "--size", "0", "64"], "size must be two positive numbers, got 0 64"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(
    words: list[str], sentence: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    Path("student.onnx").write_bytes(b"precious")
    assert main(["export", "run", *words]) == 2
    assert sentence in capsys.readouterr().err
    assert Path("student.onnx").read_bytes() == b"precious"
    assert not Path("new.onnx").exists()


def test_load_takes_a_run_a_checkpoint_and_a_file(run: Path, tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    exported = sward.load(run).export(tmp_path / "student.onnx", check=0)
    assert json.loads((tmp_path / "student.onnx.json").read_text())["proof"] is None
    expected = sward.load(run).predict(image)
    assert expected.shape == (50, 70)
    for path in (run / "checkpoints" / "best.pt", exported):
        predictor = sward.load(path)
        assert predictor.classes == sward.load(run).classes
        assert (predictor.predict(image) == expected).all()
        assert (predictor.predict(image.permute(1, 2, 0).numpy()) == expected).all()
    probabilities = predictor.probabilities(image)
    assert probabilities.shape == (len(predictor.classes), 50, 70)
    assert (probabilities.argmax(0) == expected).all()
    with pytest.raises(ValueError, match="only a run or a checkpoint can be exported"):
        predictor.export(tmp_path / "again.onnx")
    with pytest.raises(ValueError, match=r"checkpoint must be given to sward\.load, not to export, got 'last'"):
        sward.load(run).export(tmp_path / "last.onnx", checkpoint="last")
    moved = tmp_path / "best.pt"
    moved.write_bytes((run / "checkpoints" / "best.pt").read_bytes())
    with pytest.raises(ValueError, match="checkpoint must lie in RUN/checkpoints"):
        sward.load(moved)


def test_int8_is_quantised_per_channel_and_keeps_the_score(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    exported = export_run(run, path, precision="int8", calibrate=2, tolerance=0.05)
    assert sward.load(path).metadata == exported.metadata
    assert (exported.metadata.precision, exported.metadata.opset) == ("int8", 18)
    model = onnx.load(path)
    tensors = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    weights = [each for name, each in tensors.items() if each.dtype == np.int8 and each.ndim == 4]
    assert [each.shape for each in weights] == [(5, 3, 3, 3)]
    scales = [each for name, each in tensors.items() if name.endswith("_scale") and each.shape == (5,)]
    assert scales
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph.node}
    found = exported.proof
    assert found is not None
    # Different from fp32 (255 steps over logits of about -20 to 20), but hardly at all in the classes.
    assert found.largest_difference > 0.01
    assert 0 < found.differing_pixels < 0.05
    # Images of any size, still.
    assert sward.load(path).forward(torch.zeros(2, 3, 33, 70, dtype=torch.uint8)).shape == (2, 5, 33, 70)


class OneLoudChannel(nn.Module):
    """The second layer reads three quiet channels beside a loud one that it ignores: 8 bits per tensor lose them."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.spread = nn.Conv2d(3, 4, 1, bias=False)
        self.classifier = nn.Conv2d(4, num_classes, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.spread(images))


@pytest.fixture
def fragile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    register(monkeypatch, OneLoudChannel)
    monkeypatch.setattr(proof, "TIMED_SECONDS", 0.01)
    network = make_run(tmp_path / "run", network=OneLoudChannel)
    with torch.no_grad():
        network.spread.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [9000, 0, 0]])[:, :, None, None])
        network.classifier.weight[:, 3] = 0
    checkpoints.save(tmp_path / "run" / "checkpoints" / "best.pt", {"model": network.state_dict(), "step": 4})
    read = proof.evaluation_images

    def as_predicted(*arguments: Any, **options: Any) -> LabelledImages:
        """The images with the labels that the network predicts: its scores are 100 %."""
        found = read(*arguments, **options)

        @torch.no_grad()
        def samples() -> Iterator[tuple[Tensor, Tensor]]:
            for image, _ in found.samples():
                yield image, network(normalise(image)[None])[0].argmax(0)

        return replace(found, samples=samples)

    monkeypatch.setattr(proof, "evaluation_images", as_predicted)
    return tmp_path / "run"


def test_a_layer_that_loses_too_much_in_int8_stays_fp32(
    fragile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "student.onnx"
    words = ["export", str(fragile), "-o", str(path), "--int8", "--calibrate", "2", "--tolerance", "0.05"]
    assert main(words) == 0
    record = json.loads((tmp_path / "student.onnx.json").read_text())
    assert list(record["fp32_layers"]) == ["classifier"]
    lost = record["fp32_layers"]["classifier"]
    assert lost > 0.5
    assert record["proof"]["mean_iou_pytorch"] == pytest.approx(1)
    assert record["proof"]["mean_iou"] > 0.95
    told = f"layer classifier stays fp32: in int8 it alone loses {100 * lost:.2f} points of mIoU; --force quantises it"
    assert told in capsys.readouterr().out
    assert "Layer classifier stays fp32" in (tmp_path / "student.onnx.md").read_text(encoding="utf-8")
    stored = {each.name: each.data_type for each in onnx.load(path).graph.initializer}
    weights = [name for name, kind in stored.items() if kind == onnx.TensorProto.INT8 and "zero_point" not in name]
    assert [name.startswith("network.spread") for name in weights] == [True]
    # By force everything is int8, and the loss is that of the layer.
    assert main([*words, "--force", "--overwrite"]) == 0
    forced = json.loads((tmp_path / "student.onnx.json").read_text())
    assert forced["fp32_layers"] == {}
    assert forced["proof"]["mean_iou"] < 0.5


def test_fp16_keeps_the_types_of_input_and_output(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    exported = export_run(run, path, precision="fp16", check=2)
    assert exported.metadata.precision == "fp16"
    weights = [each for each in onnx.load(path).graph.initializer if each.name.endswith("classifier.weight")]
    assert [each.data_type for each in weights] == [onnx.TensorProto.FLOAT16]
    assert sward.load(path).forward(torch.zeros(1, 3, 40, 40, dtype=torch.uint8)).dtype == torch.float32
    found = exported.proof
    assert found is not None
    assert 1e-5 < found.largest_difference < 0.05


def test_a_file_that_loses_too_much_is_kept_by_force_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The layers lose too much together, and none of them alone.
    monkeypatch.setattr(proof.int8, "losses_per_layer", lambda *_: {})
    path = tmp_path / "student.onnx"
    options = {"precision": "int8", "calibrate": 1, "tolerance": 0.0}
    with pytest.raises(ProofError, match=r"mIoU of the file must be within 0 points.*keep the file with --force"):
        export_run(run, path, **options)
    assert not path.exists()
    assert export_run(run, path, force=True, **options).path.exists()


def test_a_predictor_exports_the_weights_that_it_holds(run: Path, tmp_path: Path) -> None:
    last = run / "checkpoints" / "last.pt"
    state = checkpoints.load(run / "checkpoints" / "best.pt")
    for value in state["model"].values():
        value += 1 if value.dtype == torch.int64 else 0.1
    checkpoints.save(last, state)
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    best, held = (sward.load(run, checkpoint=name) for name in ("best", "last"))
    written = sward.load(held.export(tmp_path / "last.pt2", check=0))
    assert written.metadata.source == str(last.resolve())
    torch.testing.assert_close(written.forward(image), held.forward(image), rtol=0, atol=1e-4)
    assert (written.forward(image) - best.forward(image)).abs().max() > 1e-2
