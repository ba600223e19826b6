import random
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel.cost_calibration import Calibration, calibrated, fit, mape, rank_correlation
from accel.errors import AccelError

SECONDS = st.floats(0.1, 1000.0)


class TestFit:
    @given(
        st.floats(0.3, 3.0),
        st.floats(0.0, 5.0),
        st.lists(st.floats(20.0, 1000.0), min_size=2, max_size=6),
    )
    def test_what_lies_on_a_line_is_found(self, scale, offset, predicted):
        if max(predicted) < 1.3 * min(predicted):
            return
        found = fit([(p, scale * p + offset) for p in predicted])
        for p in predicted:
            assert found[0] * p + found[1] == pytest.approx(scale * p + offset, rel=1e-6)

    def test_two_runs_give_a_line(self):
        assert fit([(10.0, 13.0), (20.0, 23.0)]) == pytest.approx((1.0, 3.0))

    def test_one_held_up_run_does_not_decide(self):
        pairs = [(p, 1.1 * p + 2) for p in (8.0, 10.0, 13.0, 15.0, 18.0, 20.0)]
        pairs[2] = (13.0, 60.0)
        scale, offset = fit(pairs)
        for p in (8.0, 14.0, 20.0):
            assert scale * p + offset == pytest.approx(1.1 * p + 2, rel=0.05)

    def test_relative_errors_count(self):
        """A second in two is more than a second in a hundred."""
        scale, offset = fit([(1.0, 2.0), (1.1, 1.9), (100.0, 110.0), (102.0, 109.0)])
        for p, m in ((1.0, 2.0), (1.1, 1.9)):
            assert scale * p + offset == pytest.approx(m, rel=0.1)

    def test_runs_that_are_alike_give_a_scale_alone(self):
        scale, offset = fit([(10.0, 13.0), (11.0, 12.0)])
        assert offset == 0
        assert 12 / 11 < scale < 13 / 10

    def test_the_line_never_falls(self):
        scale, offset = fit([(10.0, 30.0), (20.0, 15.0), (30.0, 10.0)])
        assert scale > 0
        assert offset == 0

    @pytest.mark.parametrize("pairs", [[], [(1.0, 2.0)]])
    def test_one_run_is_not_enough(self, pairs):
        with pytest.raises(AccelError, match="at least 2 measured runs"):
            fit(pairs)

    @pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
    def test_seconds_are_numbers_above_zero(self, bad):
        with pytest.raises(AccelError, match="above 0"):
            fit([(1.0, 2.0), (2.0, bad)])

    @given(st.lists(st.tuples(SECONDS, SECONDS), min_size=2, max_size=8))
    def test_it_always_ends_in_a_rising_line(self, pairs):
        scale, offset = fit(pairs)
        line = Calibration(scale, offset, len(pairs))
        assert scale > 0
        assert 0 < line.apply(0.1) < line.apply(2000.0)


class TestErrors:
    def test_mape_by_hand(self):
        assert mape([(11.0, 10.0), (15.0, 20.0)]) == pytest.approx((0.1 + 0.25) / 2)
        assert mape([(2.0, 2.0)]) == 0

    @pytest.mark.parametrize(
        ("measured", "found"),
        [
            ((1.0, 2.0, 3.0, 4.0), 1.0),
            ((4.0, 3.0, 2.0, 1.0), -1.0),
            ((2.0, 1.0, 4.0, 3.0), 0.6),
            # ties at the mean of their places: ranks 0.5, 0.5, 2, 3 against 0, 1, 2, 3
            ((1.0, 1.0, 2.0, 3.0), 4.5 / sqrt(4.5 * 5)),
            ((5.0, 5.0, 5.0, 5.0), None),
        ],
    )
    def test_rank_correlation_by_hand(self, measured, found):
        pairs = list(zip((10.0, 20.0, 30.0, 40.0), measured, strict=True))
        result = rank_correlation(pairs)
        assert result == (None if found is None else pytest.approx(found))

    @given(st.lists(st.integers(1, 100), min_size=2, max_size=8, unique=True))
    def test_only_the_order_matters(self, predicted):
        pairs = [(float(p), float(p**3 + 2)) for p in predicted]
        random.Random(0).shuffle(pairs)
        assert rank_correlation(pairs) == pytest.approx(1.0)


class TestCalibration:
    FITTED = ((10.0, 13.0), (20.0, 23.0))

    def test_it_is_judged_by_the_others(self):
        made = calibrated(self.FITTED, [(30.0, 30.0), (40.0, 43.0), (50.0, 53.0)])
        assert (made.runs, made.held_out) == (2, 3)
        assert made.mape == pytest.approx(0.1 / 3)
        assert made.rank_correlation == pytest.approx(1.0)
        assert str(made) == (
            "calibrated on 2 runs; error on 3 other plans: MAPE 3.3 %, rank correlation 1.00"
        )

    def test_without_others_its_error_is_not_known(self):
        made = calibrated(self.FITTED)
        assert made.mape is None
        assert str(made) == "calibrated on 2 runs; its error on other plans is not known"

    def test_one_other_has_no_rank(self):
        made = calibrated(self.FITTED, [(30.0, 30.0)])
        assert made.rank_correlation is None
        assert str(made).endswith("error on 1 other plan: MAPE 10.0 %, rank correlation -")

    def test_no_prediction_is_below_zero(self):
        made = Calibration(scale=2.0, offset=-10.0, runs=2)
        assert made.apply(10.0) == 10.0
        assert made.apply(1.0) == pytest.approx(0.2)

    def test_it_survives_its_file(self):
        made = calibrated(self.FITTED, [(30.0, 30.0)])
        assert Calibration.from_dict(made.to_dict()) == made

    @pytest.mark.parametrize(
        "change",
        [{"scale": 0}, {"scale": -1.0}, {"scale": "1"}, {"runs": 1.5}, {"offset": None}, {"x": 1}],
    )
    def test_what_a_file_may_not_hold(self, change):
        with pytest.raises(AccelError, match=next(iter(change))):
            Calibration.from_dict({"scale": 1.0, "offset": 0.0, "runs": 2, **change})
