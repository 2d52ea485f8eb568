"""Counted costs against the paper's columns and against formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sward.models import complexity, complexity_table, describe
from sward.models.flops import COUNTING_RULE, gemm_flops, ptflops_flops, render


def test_gemm_flops_of_a_convolution_and_of_attention() -> None:
    convolution = nn.Conv2d(3, 8, kernel_size=3, stride=2, padding=1)
    assert gemm_flops(convolution, (32, 64)) == 2 * 16 * 32 * 8 * 27

    class Attention(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = images.flatten(2).transpose(1, 2)[:, None]
            return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)

    assert gemm_flops(Attention(), (4, 8)) == 2 * 2 * 32 * 32 * 3


@pytest.mark.parametrize(
    ("name", "gflops"), [("unext", 4.626), ("resunetpp", 126.844), ("mbv3s_deeplabv3plus", 45.632)]
)
def test_students_by_the_paper_s_rule(name: str, gflops: float) -> None:
    pytest.importorskip("ptflops")
    row = complexity(name)
    assert row.paper_rule_flops is not None
    assert row.paper_rule_flops / 1e9 == pytest.approx(gflops, abs=1e-3)
    assert row.paper_rule_params == row.params
    if name != "mbv3s_deeplabv3plus":
        assert round(row.params / 1e6, 2) == row.paper_params_millions
        assert round(row.paper_rule_flops / 1e9, 2) == row.paper_gflops


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sam2_hiera_large_deeplabv3plus", "medsam2_hiera_tiny_resunetpp"])
def test_teachers_by_the_paper_s_rule(name: str) -> None:
    pytest.importorskip("ptflops")
    row, description = complexity(name), describe(name)
    assert row.paper_rule_params is not None
    assert row.paper_rule_flops is not None
    assert round(row.paper_rule_params / 1e6, 2) == description.paper_params_millions
    assert round(row.paper_rule_flops / 1e9, 2) == description.paper_gflops


def test_tiny_teacher_counts_attention() -> None:
    """The trunk takes 60.935 GFLOPs with attention at 512x512, the head comes on top."""
    row = complexity("medsam2_hiera_tiny_resunetpp", paper_rule=False)
    assert row.params == 38_007_058
    assert row.gemm_flops / 1e9 == pytest.approx(60.935 + 2 * 8.73, abs=0.01)
    assert row.paper_rule_flops is None


def test_table_keeps_order_and_renders_every_row() -> None:
    rich = pytest.importorskip("rich.console")
    rows = complexity_table(("unext", "hiera_demo"), num_classes=5, image_size=(64, 96), paper_rule=False)
    assert [row.name for row in rows] == ["unext", "hiera_demo"]
    assert [row.role for row in rows] == ["student", "teacher"]
    console = rich.Console(width=200, record=True)
    console.print(render(rows))
    text = console.export_text()
    assert all(row.name in text for row in rows)
    assert f"{rows[1].params / 1e6:.2f}" in text
    assert COUNTING_RULE.split(":")[0] in text


def test_flops_grow_with_the_area() -> None:
    small, large = (complexity("unext", image_size=size, paper_rule=False) for size in ((64, 64), (64, 128)))
    assert large.gemm_flops == 2 * small.gemm_flops


def test_without_ptflops_the_paper_s_rule_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert ptflops_flops(nn.Conv2d(3, 1, 1), (32, 32)) is None


def test_size_that_is_not_a_multiple_of_32() -> None:
    with pytest.raises(ValueError, match="image height and width must be positive multiples of 32, got 100x64"):
        complexity("unext", image_size=(100, 64), paper_rule=False)
