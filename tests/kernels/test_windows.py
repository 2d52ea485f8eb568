"""The index arithmetic of shifted windows, compared with loops over single pixels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sward_kernels.windows import WindowGrid, split_windows


def expected_token(height: int, width: int, side: int, shift: tuple[int, int], window: int, token: int) -> int:
    """The flat source pixel of a token by Eq. 5-7, one at a time; -1 for padding."""
    window_columns = -(-width // side)
    row = window // window_columns * side + token // side
    column = window % window_columns * side + token % side
    if row >= height or column >= width:
        return -1
    return (row + shift[0]) % height * width + (column + shift[1]) % width


@st.composite
def grids(draw: st.DrawFn) -> tuple[WindowGrid, tuple[int, int]]:
    height, width, side = draw(st.integers(1, 19)), draw(st.integers(1, 19)), draw(st.integers(1, 9))
    shift = (draw(st.integers(0, side - 1)), draw(st.integers(0, side - 1)))
    return WindowGrid(height, width, side), shift


@given(case=grids())
def test_partition_reads_the_pixels_the_equations_name(case: tuple[WindowGrid, tuple[int, int]]) -> None:
    grid, shift = case
    pixels = torch.arange(1.0, grid.height * grid.width + 1).view(1, 1, grid.height, grid.width)
    tokens = grid.partition(pixels, shift)
    assert tokens.shape == (1, grid.windows, grid.tokens, 1)
    expected = [
        [1 + expected_token(grid.height, grid.width, grid.window_size, shift, window, token)
         for token in range(grid.tokens)]
        for window in range(grid.windows)
    ]  # fmt: skip
    assert tokens[0, :, :, 0].tolist() == expected  # padding reads as zero
    assert torch.equal(grid.real_tokens(), tokens[0, :, :, 0] > 0)
    assert int(grid.real_tokens().sum()) == grid.height * grid.width


@given(case=grids(), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_a_shift_on_the_device_rolls_as_ints_do(case: tuple[WindowGrid, tuple[int, int]], dtype: torch.dtype) -> None:
    grid, shift = case
    maps = torch.randn(2, 3, grid.height, grid.width)
    rolled = grid.roll(maps, torch.tensor(shift, dtype=dtype))
    assert torch.equal(rolled, grid.roll(maps, shift))
    assert torch.equal(grid.roll(rolled, -torch.tensor(shift, dtype=dtype)), maps)


@given(case=grids(), data=st.data())
def test_runs_cover_each_pixel_once_and_agree_with_the_roll(
    case: tuple[WindowGrid, tuple[int, int]], data: st.DataObject
) -> None:
    grid, shift = case
    start = data.draw(st.integers(0, grid.padded_height))
    stop = data.draw(st.integers(start, grid.padded_height))
    rows = grid.source_rows(shift).tolist()
    read = {}
    for run in grid.row_runs(start, stop, shift):
        targets, sources = range(start, stop)[run.target], range(grid.height)[run.source]
        assert len(targets) == len(sources)
        for target, source in zip(targets, sources):
            assert target not in read
            read[target] = source
    assert read == {row: rows[row] for row in range(start, min(stop, grid.height))}


def test_column_runs_wrap_at_the_width() -> None:
    runs = WindowGrid(4, 10, 4).column_runs(8, 12, (0, 3))  # columns 8 and 9 of the rolled grid; 10 and 11 are padding
    assert [(run.target, run.source) for run in runs] == [(slice(0, 2), slice(1, 3))]
    runs = WindowGrid(4, 10, 4).column_runs(4, 8, (0, 3))
    assert [(run.target, run.source) for run in runs] == [
        (slice(0, 3), slice(7, 10)),
        (slice(3, 4), slice(0, 1)),
    ]


def test_windows_are_numbered_row_by_row() -> None:
    maps = torch.arange(8.0).view(1, 2, 4)
    windows = split_windows(maps, 2)
    assert windows.tolist() == [[[0, 1, 4, 5]], [[2, 3, 6, 7]]]


@pytest.mark.parametrize(("height", "width", "side"), [(8, 16, 4), (7, 16, 4), (3, 2, 4)])
def test_padding_reaches_the_next_multiple_of_the_side(height: int, width: int, side: int) -> None:
    grid = WindowGrid(height, width, side)
    assert grid.padded_height % side == grid.padded_width % side == 0
    assert 0 <= grid.padded_height - height < side
    assert 0 <= grid.padded_width - width < side
