"""What the command line prints besides results."""

from __future__ import annotations

import sys
import warnings

import pytest

from sward.cli import printing


def test_a_warning_is_one_line_and_is_printed_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = warnings.formatwarning

    def show(message: Warning, category: type[Warning], name: str, line: int, *_: object) -> None:
        sys.stderr.write(warnings.formatwarning(message, category, name, line))

    # pytest records warnings and prints none; this prints them as Python does.
    monkeypatch.setattr(warnings, "showwarning", show)
    with printing.plain_warnings():
        for text in ("few tokens", "few tokens", "other"):
            warnings.warn_explicit(text, UserWarning, "file.py", 1, registry={})
        warnings.warn_explicit("of another kind", RuntimeWarning, "file.py", 1, registry={})
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["warning: few tokens", "warning: other"]
    assert lines[2] == "file.py:1: RuntimeWarning: of another kind"
    assert warnings.formatwarning is before


def test_names_in_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    printing.print_table("runs/[old]", ("score", "%"), [("IoU nerve [left]", "61.70")])
    title, *table = capsys.readouterr().out.splitlines()
    assert title == "runs/[old]"
    assert any("IoU nerve [left]" in line and "61.70" in line for line in table)
