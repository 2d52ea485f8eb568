"""The completion script: sourced by a real shell, it completes what a user types."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from sward import methods, presets
from sward.cli.completion import script
from sward.cli.main import COMMANDS, main

BASH = shutil.which("bash")


@pytest.fixture(scope="module")
def completing() -> str:
    return script("bash", list(COMMANDS))


@pytest.mark.skipif(BASH is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("exp", {"export"}),
        ("train clinicdb-u", {"clinicdb-unext"}),
        ("train demo --optimizer.l", {"--optimizer.lr"}),
        ("train demo --student-l", {"--student-layers"}),
        ("train-teacher demo --trunk", {"--trunk-checkpoint"}),
        ("train demo --distillation c", {name for name in methods.METHODS if name.startswith("c")}),
        ("train demo --precision ", {"fp32", "bf16", "fp16"}),
        ("train demo --model mbv", {"mbv3s_deeplabv3plus"}),
        ("train demo --dataset.name cvc", {"cvc_clinicdb", "cvc_colondb"}),
        ("evaluate --checkpoint ", {"best", "last"}),
        ("evaluate --dataset cvc", {"cvc_clinicdb", "cvc_colondb"}),
        ("data pack --mask-v", {"--mask-values"}),
        ("list me", {"methods"}),
        ("layers une", {"unext"}),
    ],
)
def test_bash_completes(typed: str, expected: set[str], completing: str) -> None:
    words = ["sward", *typed.split(" ")]
    asked = f"COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}; _sward"
    command = [str(BASH), "-c", f'{completing}\n{asked}\necho "${{COMPREPLY[@]}}"']
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected
    assert done.stderr == ""


@pytest.mark.skipif(BASH is None, reason="there is no bash")
def test_the_script_is_registered_for_sward_alone(completing: str) -> None:
    done = subprocess.run([str(BASH), "-c", f"{completing}\ncomplete -p"], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in done.stdout.splitlines() if "_sward" in line] == ["sward"]


def test_both_shells_are_printed_and_others_refused(capsys: pytest.CaptureFixture[str]) -> None:
    printed = {}
    for shell in ("bash", "zsh"):
        assert main(["completion", shell]) == 0
        printed[shell] = capsys.readouterr().out
    assert printed["zsh"] == f"autoload -Uz bashcompinit && bashcompinit\n{printed['bash']}"
    assert all(name in printed["bash"] for name in presets.names())
    assert main(["completion", "fish"]) == 2
    assert capsys.readouterr().err == "sward completion: completion must be followed by bash or zsh, got fish\n"
