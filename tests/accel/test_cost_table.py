import json
from dataclasses import replace

import pytest
from cost_cases import EXTRA, KEEPS, NAMES, SHAPE, TABLE
from hypothesis import given
from hypothesis import strategies as st

from accel.cost_table import CostTable, Price, isotonic
from accel.errors import AccelError
from accel.origin import MAX_FILE_BYTES, Origin

HERE = Origin("a chip, 2 threads", {"torch": "2.13.0", "triton": "3.7"}, "0123")
FULL = replace(
    TABLE,
    dense_ms=Price(2.0, 1.5, 3.0),
    mask=Price(0.2, 0.1, 0.4),
    recall=Price(0.3, 0.3, 0.3),
    term=Price(0.1, 0.0, 0.1),
    origin=HERE,
)


def with_row(prices):
    row = tuple(map(Price.known, prices))
    return replace(TABLE, sparse={**TABLE.sparse, "drop/natural": row})


class TestPrices:
    @pytest.mark.parametrize("name", NAMES)
    def test_measured_keeps_are_exact(self, name):
        rest, order = name.split("/")
        for keep, price in zip(KEEPS, TABLE.sparse[name], strict=True):
            assert TABLE.price(keep, rest, order == "ordered") == price.value

    @given(
        st.lists(st.floats(0.01, 3.0), min_size=len(KEEPS), max_size=len(KEEPS)),
        st.floats(1e-6, 1.0),
        st.floats(1e-6, 1.0),
    )
    def test_keeping_more_is_never_cheaper(self, prices, one, other):
        table = with_row(prices)
        low, high = (table.price(keep, "drop", False) for keep in sorted((one, other)))
        assert low <= high
        assert min(prices) * (1 - 1e-12) <= low
        assert high <= max(prices) * (1 + 1e-12)

    def test_between_two_keeps_it_is_linear(self):
        assert TABLE.price(0.125, "drop", False) == pytest.approx(0.175)
        assert TABLE.price(0.9, "taylor", True) == pytest.approx(EXTRA["taylor/ordered"] + 0.9)

    def test_below_the_least_keep_it_is_flat(self):
        assert TABLE.price(0.001, "mean", True) == TABLE.sparse["mean/ordered"][0].value

    def test_a_price_that_falls_is_noise(self):
        prices = [p.value for p in TABLE.sparse["drop/natural"]]
        prices[3], prices[4] = 0.5, 0.1
        table = with_row(prices)
        assert table.price(KEEPS[3], "drop", False) == pytest.approx(0.3)
        assert table.price(KEEPS[4], "drop", False) == pytest.approx(0.3)
        # what was measured is kept as it was
        assert table.sparse["drop/natural"][4].value == 0.1

    def test_the_median_and_the_spread_of_samples(self):
        assert Price.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == pytest.approx((3.5, 2.0, 5.0))


class TestIsotonic:
    @pytest.mark.parametrize(
        ("values", "found"),
        [
            ([1, 2, 3], [1, 2, 3]),
            ([3, 2, 1], [2, 2, 2]),
            ([1, 3, 2, 4], [1, 2.5, 2.5, 4]),
            ([4, 1, 1, 3], [2, 2, 2, 3]),
            ([], []),
        ],
    )
    def test_by_hand(self, values, found):
        assert isotonic([float(v) for v in values]) == found

    @given(st.lists(st.floats(0, 10), min_size=1, max_size=12))
    def test_it_rises_and_keeps_the_sum(self, values):
        found = isotonic(values)
        assert found == sorted(found)
        assert sum(found) == pytest.approx(sum(values), abs=1e-9)

    @given(st.lists(st.floats(0, 10), min_size=2, max_size=8), st.data())
    def test_no_rising_sequence_is_nearer(self, values, data):
        other = sorted(data.draw(st.lists(st.floats(0, 10), min_size=8)))[: len(values)]
        found = isotonic(values)
        own = sum((a - b) ** 2 for a, b in zip(found, values, strict=True))
        assert own <= sum((a - b) ** 2 for a, b in zip(other, values, strict=True)) + 1e-9


class TestFiles:
    def test_a_table_survives_its_file(self, tmp_path):
        FULL.save(tmp_path / "table.json")
        assert CostTable.load(tmp_path / "table.json", HERE) == FULL

    @pytest.mark.parametrize(
        "other",
        [
            replace(HERE, device="another chip"),
            replace(HERE, versions={"torch": "2.14.0", "triton": "3.7"}),
            replace(HERE, code="4567"),
        ],
        ids=["device", "versions", "code"],
    )
    def test_a_table_of_elsewhere_is_refused_unless_it_is_asked_for(self, tmp_path, other):
        path = tmp_path / "table.json"
        FULL.save(path)
        with pytest.raises(AccelError, match="was measured on a chip, 2 threads") as error:
            CostTable.load(path, other)
        assert str(other) in str(error.value)
        assert "hardware.foreign=true" in str(error.value)
        assert CostTable.load(path, other, foreign=True) == FULL
        assert CostTable.load(path) == FULL

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"schema": 1}, "schema 2"),
            ({"extra": 1}, "no key 'extra'"),
            ({"dense_ms": [1, 1]}, "dense_ms must be three numbers"),
            ({"dense_ms": [2, 3, 4]}, "low <= median <= high"),
            ({"dense_ms": [True, True, True]}, "dense_ms must be three numbers"),
            ({"mask": "0.5"}, "mask must be three numbers"),
            ({"select": {"block_mass": [-1, -1, -1]}}, "select['block_mass'] must have 0 <= low"),
            ({"dense": [1]}, "dense must be of type dict"),
            ({"sparse": {"drop/natural": [[1, 1, 1]]}}, "sparse has the rows"),
            ({"keeps": [0.5, 1.0]}, "11 prices for 2 keeps"),
            ({"keeps": [*KEEPS[:-1], 0.9]}, "the last of the keeps must be 1"),
            ({"keeps": [*KEEPS[1:], 1.0]}, "keeps must ascend"),
            ({"keeps": ["a"] * 11}, "keeps must be numbers"),
            ({"keeps": [0.5] * 300}, "keeps has 300 entries"),
            ({"source": "hearsay"}, "source is one of measured, roofline"),
            ({"origin": {"device": "x"}}, "origin lacks the key"),
            ({"origin": {"device": 1, "versions": {}, "code": ""}}, "origin.device must be"),
            ({"shape": {"tokens": 1}}, "shape lacks the key"),
        ],
    )
    def test_what_a_file_may_not_hold(self, tmp_path, change, words):
        path = tmp_path / "table.json"
        FULL.save(path)
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(AccelError) as error:
            CostTable.load(path)
        assert words in str(error.value)
        assert str(path) in str(error.value)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("tokens", 0), ("heads", 1.5), ("batch", True), ("precision", "double"), ("block", [5])],
    )
    def test_what_a_shape_may_not_be(self, tmp_path, name, value):
        path = tmp_path / "table.json"
        FULL.save(path)
        data = json.loads(path.read_text())
        data["shape"][name] = value
        path.write_text(json.dumps(data))
        with pytest.raises(AccelError, match=name):
            CostTable.load(path)

    @pytest.mark.parametrize(
        "text", ['{"schema": NaN}', "{", "[" * 100_000, '{"a": ' + "1" * 5000 + "}", "[]"]
    )
    def test_what_is_no_table_at_all(self, tmp_path, text):
        path = tmp_path / "table.json"
        path.write_text(text)
        with pytest.raises(AccelError, match="table"):
            CostTable.load(path)

    def test_a_file_that_is_too_large_or_not_there(self, tmp_path):
        path = tmp_path / "table.json"
        with pytest.raises(AccelError, match="there is no file"):
            CostTable.load(path)
        path.write_text(" " * (MAX_FILE_BYTES + 1))
        with pytest.raises(AccelError, match="tables have at most"):
            CostTable.load(path)

    def test_a_row_needs_a_price_for_every_keep(self):
        with pytest.raises(AccelError, match="10 prices for 11 keeps"):
            with_row([1.0] * 10)
        assert SHAPE.batch == 1
