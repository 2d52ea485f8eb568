"""What the benchmark scripts refuse, which rows of committed tables they keep, and what their clocks count."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data_loading
import deployment
import mwad_throughput
import pytest
import torch
import training_step

import harness
from result_rows import merge_rows, stored_rows
from sward.training import first_state
from sward.training.state import TrainingState


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("training_step --preset demo --batch 0", "--batch must be more than 0, got 0"),
        ("training_step --batch 2", "--image-size and --batch need --preset"),
        ("training_step --image-size 64 64", "--image-size and --batch need --preset"),
        ("training_step --rounds 0", "--rounds must be more than 0, got 0"),
        ("training_step --preset demo --image-size 100 100", "--image-size must be multiples of 32, got 100 100"),
        ("pdr_throughput --device foo", "--device must be cpu or cuda, got 'foo'"),
        ("pdr_throughput --device cuda:99", "--device cuda:99 needs a GPU that this machine does not have"),
        ("stream_cost --teraflops 0", "--teraflops must be more than 0, got 0.0"),
        ("deployment --models nosuch", "got 'nosuch'"),
        ("deployment --sizes 128 0", "--sizes must be more than 0, got 0"),
        ("study colondb-small --runs none --seeds -1", "--seeds must be at least 0, got -1"),
        ("data_check --images 0", "--images must be at least 2, got 0"),
        ("data_loading --frames 1", "--frames must be 2 to 64, got 1"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(
    command: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *words = command.split()
    script = importlib.import_module(name)
    monkeypatch.setattr("sys.argv", [name, *words])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(sentence)


def test_a_table_keeps_the_rows_of_cases_that_were_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "keep_freed_memory", lambda: None)
    path = tmp_path / "rows.csv"
    for cases, milliseconds in ((("network", "sweep"), 1.0), (("network",), 2.0)):
        session = harness.Session("name", torch.device("cpu"))
        for case in cases:
            times = (milliseconds, milliseconds, milliseconds)
            session.measurements.append(harness.Measurement(case, "mode", "eager", *times, 0, 0, 0.0, 1e-4))
        session.write_csv(path)
    assert {row["case"]: row["p50_ms"] for row in stored_rows(path)} == {"sweep": "1.0000", "network": "2.0000"}


def test_a_quick_look_writes_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[mwad_throughput.Stage] = []
    monkeypatch.setattr(harness, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(mwad_throughput, "compare", lambda session, stage, seconds: stages.append(stage))
    monkeypatch.setattr("sys.argv", ["mwad_throughput", "--quick", "--results", str(tmp_path)])
    assert mwad_throughput.main() == 0
    assert stages == list(mwad_throughput.QUICK)
    assert list(tmp_path.iterdir()) == []


def test_rows_of_other_cases_and_devices_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    for device, cases, value in (("Xeon", ("city", "polyp"), 1), ("EPYC", ("city",), 2), ("Xeon", ("city",), 3)):
        rows = [{"case": case, "device": device, "value": value} for case in cases]
        stored = merge_rows(path, rows, key=("case", "device"))
    expected = [("polyp", "Xeon", "1"), ("city", "EPYC", "2"), ("city", "Xeon", "3")]
    assert [tuple(row.values()) for row in stored_rows(path)] == expected
    assert stored == stored_rows(path)


def test_cases_deployed_again_replace_their_own_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, now = tmp_path / "rows.csv", iter("1234")

    def measured(*_: object) -> list[dict[str, str]]:
        times = {"milliseconds": next(now), "rounds": "1", "file_MB": "1"}
        return [{"variant": variant, **times} for variant in deployment.VARIANTS]

    monkeypatch.setattr(deployment, "_measure", measured)
    for words in ([], ["--again", "--sizes", "256"]):
        sizes = [] if words else ["--sizes", "128", "256"]
        monkeypatch.setattr(
            "sys.argv",
            ["deployment", "--models", "unext", "--threads", "1", *sizes, *words, "--results", str(path)],
        )
        deployment.main()
    assert {row["size"]: row["milliseconds"] for row in stored_rows(path)} == {"128": "1", "256": "3"}


def test_training_steps_of_other_threads_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(training_step, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["training_step", "--preset", "demo", "--device", "cpu"])
    for threads, value in ((1, 5.0), (2, 3.0), (1, 4.0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(training_step, "measure", lambda *_, value=value: {"step": value, "cache": ""})
        training_step.main()
    found = {(row["device"][-9:], row["part"]): row["value"] for row in stored_rows(tmp_path / "training_step_cpu.csv")}
    assert found == {
        ("2 threads", "step"): "3.0000",
        ("2 threads", "cache"): "",
        ("1 threads", "step"): "4.0000",
        ("1 threads", "cache"): "",
    }


def test_a_timed_step_has_the_optimiser_of_training_and_its_memory_no_earlier_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optimizers: list[torch.optim.Optimizer] = []

    def first_state_of(*arguments: Any, **options: Any) -> TrainingState:
        state = first_state(*arguments, **options)
        optimizers.append(state.optimizer)
        return state

    def peak(run: object, device: torch.device) -> int:
        parameters = [each for group in optimizers[0].param_groups for each in group["params"]]
        assert all(each.grad is None for each in parameters)
        return 2**20

    monkeypatch.setattr(training_step, "first_state", first_state_of)
    monkeypatch.setattr(training_step, "peak_extra_bytes", peak)
    monkeypatch.setattr(training_step, "load_batch", lambda config: None)
    monkeypatch.setattr(training_step.Clock, "__call__", lambda self, run, rounds=None: 1.0)
    row = training_step.measure(training_step.Shape("demo", (32, 32), 2), "cwd", torch.device("cpu"), rounds=1)
    assert row["memory"] == 1
    assert optimizers[0].defaults["fused"] is True


def test_batches_that_were_ready_before_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stands still for 4 batches, and needs a second for each of the others."""
    now, made = 0.0, 0

    def loader(_: object) -> Iterator[int]:
        nonlocal now, made
        while True:
            made += 1
            now += 0 if made <= 4 else 1
            yield data_loading.BATCH

    monkeypatch.setattr(data_loading.time, "perf_counter", lambda: now)
    rate = data_loading.per_second(loader, None, skip=4, least=data_loading.LEAST_BATCHES, seconds=1.5)  # type: ignore[arg-type]
    assert rate == data_loading.BATCH
    assert made == 4 + data_loading.LEAST_BATCHES


def test_batches_do_not_end_with_the_images() -> None:
    images = [(torch.zeros(1), torch.zeros(1), 0)] * 3
    stream = data_loading.batches(workers=0)(images)  # type: ignore[arg-type]
    assert [next(stream) for _ in range(20)] == [data_loading.BATCH] * 20
