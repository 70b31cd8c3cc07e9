import math
import statistics

import pytest
import torch

from nextscale.base.statistics import centred, deviation, standard_error

NAN = math.nan
ROWS = [[1.0, 2.0, 4.5, 3.25], [0.5, NAN, 0.25, NAN], [7.0, NAN, NAN, NAN], [NAN] * 4]


def test_what_is_not_scored_is_left_out() -> None:
    values = torch.tensor(ROWS)
    for row, mean, spread, error in zip(
        ROWS, centred(values).tolist(), deviation(values)[:, 0].tolist(), standard_error(values), strict=True
    ):
        scored = [each for each in row if not math.isnan(each)]
        expected = statistics.stdev(scored) if len(scored) > 1 else 0.0
        middle = statistics.mean(scored) if scored else 0.0
        assert mean == pytest.approx([0.0 if math.isnan(each) else each - middle for each in row])
        assert spread == pytest.approx(expected)
        assert error.item() == pytest.approx(expected / max(1, len(scored)) ** 0.5)


def test_equal_values_centre_to_exactly_zero() -> None:
    values = torch.full((3, 7), 0.3)
    assert centred(values).eq(0).all() and deviation(values).eq(0).all()
