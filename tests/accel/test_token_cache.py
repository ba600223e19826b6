import json
import re
from dataclasses import replace
from math import nan

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_denoiser import tiny_plan

from accel.choice import DENSE
from accel.context import Where
from accel.errors import PlanError
from accel.plan import Plan
from accel.schedule import Phase, Schedule
from accel.token_cache import FEEDS, MAX, TokenCache

PLAN = tiny_plan(DENSE)


@st.composite
def caches(draw):
    frozen = draw(st.booleans())
    return TokenCache(
        feed="block" if frozen else draw(st.sampled_from(FEEDS)),
        keep=draw(st.floats(0, 1, exclude_min=True)),
        pool=2 * draw(st.integers(0, 9)) + 1,
        by_head=draw(st.booleans()),
        delay=draw(st.integers(0, 9)),
        refresh=draw(st.none() | st.integers(1, 9)),
        blocks=1 if frozen else draw(st.none() | st.integers(1, 9)),
        external="frozen" if frozen else "attend",
        window=draw(st.none() | st.integers(0, MAX)),
    )


@given(caches())
def test_a_cache_survives_its_dictionary(cache):
    assert TokenCache.from_dict(json.loads(json.dumps(cache.to_dict()))) == cache


@given(caches())
def test_a_plan_with_a_cache_survives_its_file(tmp_path_factory, cache):
    plan = replace(PLAN, cache=cache)
    loaded = Plan.load(plan.save(tmp_path_factory.mktemp("plans") / "plan.json"))
    assert loaded == plan
    assert loaded.cache == cache
    assert loaded.digest == plan.digest != PLAN.digest


def test_a_plan_without_one_says_nothing_of_it():
    assert "cache" not in PLAN.to_dict()
    assert Plan.from_dict({**PLAN.to_dict(), "cache": None}).digest == PLAN.digest
    digests = {replace(PLAN, cache=TokenCache(feed=feed)).digest for feed in FEEDS}
    assert len(digests) == len(FEEDS)


@given(caches(), st.integers(0, 60))
def test_steps_between_whole_calls_stand_on_a_cache_that_is_filled(cache, step):
    if not cache.whole(step):
        assert cache.holds
    if step <= cache.delay:
        assert cache.whole(step)


@given(caches())
def test_whole_calls_stand_where_the_cache_says(cache):
    whole = {step for step in range(40) if cache.whole(step)}
    again = set(range(0, 40, cache.refresh)) if cache.refresh else {0}
    assert whole == {*range(min(cache.delay + 1, 40)), *again}


BAD = {
    "feed": ({"feed": "bloc"}, "cache.feed 'bloc' is unknown; did you mean 'block'?"),
    "feed null": ({"feed": None}, "cache.feed None is unknown"),
    "external": ({"external": "freeze"}, "cache.external 'freeze' is unknown"),
    "keep of none": ({"keep": 0}, "cache.keep is a fraction in (0, 1], got 0"),
    "keep above one": ({"keep": 1.01}, "cache.keep is a fraction in (0, 1], got 1.01"),
    "keep nan": ({"keep": nan}, "cache.keep is a fraction in (0, 1], got nan"),
    "keep a word": ({"keep": "half"}, "cache.keep is a fraction in (0, 1], got 'half'"),
    "keep a switch": ({"keep": True}, "cache.keep is a fraction in (0, 1], got True"),
    "by_head": ({"by_head": 1}, "cache.by_head is true or false, got 1"),
    "pool of none": ({"pool": 0}, "cache.pool is a whole number from 1, got 0"),
    "pool null": ({"pool": None}, "cache.pool is a whole number from 1, got None"),
    "pool even": ({"pool": 4}, "cache.pool is an odd number of neighbours, got 4"),
    "delay": ({"delay": -1}, "cache.delay is a whole number from 0, got -1"),
    "delay null": ({"delay": None}, "cache.delay is a whole number from 0, got None"),
    "refresh": ({"refresh": 0}, "cache.refresh is a whole number from 1, got 0"),
    "refresh half": ({"refresh": 1.5}, "cache.refresh is a whole number from 1, got 1.5"),
    "blocks": ({"blocks": 0}, "cache.blocks is a whole number from 1, got 0"),
    "blocks a switch": ({"blocks": True}, "cache.blocks is a whole number from 1, got True"),
    "window": ({"window": -1}, "cache.window is a whole number from 0, got -1"),
    "window too wide": ({"window": MAX + 1}, "cache.window is a whole number from 0"),
    "frozen suffix": (
        {"external": "frozen", "feed": "suffix"},
        "cache.external 'frozen' is what one block saw: it needs feed 'block' and blocks 1",
    ),
    "frozen blocks": ({"external": "frozen", "blocks": 2}, "needs feed 'block' and blocks 1"),
    "frozen whole": ({"external": "frozen", "blocks": None}, "needs feed 'block' and blocks 1"),
    "unknown key": ({"keeps": 0.5}, "cache has no key 'keeps'; did you mean 'keep'?"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_what_is_refused(data, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        TokenCache.from_dict(data)
    with pytest.raises(PlanError, match=re.escape(message)):
        Plan.from_dict({**PLAN.to_dict(), "cache": data})


@pytest.mark.parametrize("data", [[], "block", 3])
def test_a_cache_is_a_table(data):
    with pytest.raises(PlanError, match="cache must be a table"):
        Plan.from_dict({**PLAN.to_dict(), "cache": data})


class TestScheduleOfBlocks:
    BY_BLOCK = Schedule(dense_start=0.25, refresh=(0.5,), axis="block")

    def test_progress_is_that_of_the_block(self):
        found = [
            self.BY_BLOCK.at(Where(4 * block + step, 8, block=(block, step, 4)))
            for block in range(2)
            for step in range(4)
        ]
        dense, early, late = Phase(None, 0), Phase(0, 0), Phase(0, 1)
        assert found == [
            replace(phase, block=block)
            for block in range(2)
            for phase in (dense, early, late, late)
        ]

    def test_what_follows_the_last_step_of_a_block_is_dense(self):
        where = Where(2, 8, block=(0, 2, 4))
        assert self.BY_BLOCK.after(where) == Phase(0, 1)
        assert self.BY_BLOCK.after(Where(3, 8, block=(0, 3, 4))).dense

    @given(st.integers(1, 20).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))))
    def test_a_run_without_blocks_is_one(self, place):
        where = Where(*place)
        assert self.BY_BLOCK.at(where) == replace(self.BY_BLOCK, axis="run").at(where)

    def test_a_schedule_of_the_run_does_not_look_at_blocks(self):
        run = replace(self.BY_BLOCK, axis="run")
        assert run.at(Where(5, 8, block=(1, 1, 4))) == run.phase(5, 8)

    def test_it_is_written_only_where_it_is_not_the_run(self):
        assert "axis" not in Schedule().to_dict()
        assert self.BY_BLOCK.to_dict()["axis"] == "block"
        assert Schedule.from_dict(self.BY_BLOCK.to_dict()) == self.BY_BLOCK
        assert Schedule.from_dict({"axis": "run"}) == Schedule()
        plan = tiny_plan(DENSE, schedule=self.BY_BLOCK)
        assert plan.digest != tiny_plan(DENSE, schedule=replace(self.BY_BLOCK, axis="run")).digest

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("axis", ["blocks", None, 1, ["block"]])
    def test_another_axis_is_refused(self, axis):
        with pytest.raises(PlanError, match=re.escape(f"schedule.axis {axis!r} is unknown")):
            Schedule.from_dict({"axis": axis})
