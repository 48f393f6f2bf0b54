"""Properties of every tile plan."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdd_cli.upscaling.tiling import Span, feather, fit_tile, plan_tiles

SIDES = st.integers(1, 300)
TILES = st.integers(1, 120)
OVERLAPS = st.integers(0, 80)
MULTIPLES = st.sampled_from([1, 2, 4, 8])


@given(SIDES, SIDES, TILES, TILES, OVERLAPS, MULTIPLES)
def test_tiles_lie_inside_have_one_shape_and_the_asked_size(
    height: int, width: int, tile_height: int, tile_width: int, overlap: int, multiple: int
) -> None:
    height, width = height * multiple, width * multiple
    plan = plan_tiles(height, width, tile=(tile_height, tile_width), overlap=overlap, multiple=multiple)
    for spans, length, tile in ((plan.rows, height, tile_height), (plan.columns, width, tile_width)):
        assert spans[0].start == 0
        assert spans[-1].stop == length
        sizes = {span.stop - span.start for span in spans}
        assert len(sizes) == 1
        assert sizes.pop() <= max(tile, multiple)
        assert all(span.start % multiple == span.stop % multiple == 0 for span in spans)
        half = tile // multiple // 2 * multiple
        for before, after in pairwise(spans):
            assert before.start < after.start
            assert before.stop - after.start >= min(overlap, half)


@given(SIDES, SIDES, TILES, OVERLAPS, st.sampled_from([1, 2, 3, 4, 8]))
def test_weights_are_fractions_and_sum_to_one_everywhere(
    height: int, width: int, tile: int, overlap: int, scale: int
) -> None:
    height, width = min(height, 90), min(width, 90)
    plan = plan_tiles(height, width, tile=(max(tile, 8), max(tile, 8)), overlap=overlap)
    total = np.zeros((height * scale, width * scale))
    count = 0
    for row, column, down, across in plan.tiles(scale):
        weights = np.outer(down, across)
        assert (weights >= 0).all()
        assert weights.shape == tuple(side * scale for side in plan.tile_size)
        total[row.at(scale), column.at(scale)] += weights
        count += 1
    assert count == len(plan)
    np.testing.assert_allclose(total, 1, atol=1e-5)


@given(SIDES, SIDES, st.integers(1, 40_000))
def test_fitted_tile_is_within_the_budget(height: int, width: int, pixels: int) -> None:
    tile = fit_tile(height, width, pixels)
    if tile is None:
        assert height * width <= pixels
        return
    assert 1 <= tile[0] <= height
    assert 1 <= tile[1] <= width
    assert tile[0] * tile[1] <= pixels < height * width
    # A narrow image gets long tiles: the budget is used to more than a half.
    assert tile[0] * tile[1] * 2 > pixels or pixels <= 3


def test_examples() -> None:
    assert plan_tiles(100, 50, tile=None, overlap=32).tile_size == (100, 50)
    # Two tiles of 116 cover 200 with an overlap of 32; tiles of 128 would compute more for nothing.
    assert plan_tiles(10, 200, tile=(128, 128), overlap=32).columns == (Span(0, 116), Span(84, 200))
    # 201 doesn't come out even: the last tile is shifted inward.
    assert plan_tiles(10, 201, tile=(128, 128), overlap=32).columns == (Span(0, 117), Span(84, 201))
    # An overlap of more than half a tile is taken as half: 24 of 48.
    assert plan_tiles(10, 100, tile=(48, 48), overlap=32).columns[:2] == (Span(0, 43), Span(19, 62))
    with pytest.raises(ValueError, match="multiple"):
        plan_tiles(9, 8, tile=None, overlap=0, multiple=2)


def test_weight_rises_from_the_edge_of_a_tile() -> None:
    first, second = feather((Span(0, 20), Span(12, 32)), 2)
    assert (first[:24] == 1).all()
    assert (np.diff(second[:16]) > 0).all()
    assert second[0] < 0.01
    np.testing.assert_allclose(first[24:] + second[:16], 1, atol=1e-6)
