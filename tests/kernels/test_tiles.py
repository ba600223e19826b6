"""Tiles fit what they are for; the user's table is kept, read strictly, and never in the way."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest

from accel.kernels import tiles as module
from accel.kernels.tiles import (
    SHARED_BYTES,
    Tiles,
    candidates,
    choose_tiles,
    save_tiles,
    shared_bytes,
    tiles_key,
    trying,
    user_table_path,
)

KEY = tiles_key(arch=90, block=(128, 64), dim=96, element_bytes=2)
OTHER = tiles_key(arch=80, block=(64, 64), dim=64, element_bytes=4, access="ordered", rest="taylor")


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    module._user_table.cache_clear()
    yield tmp_path / "accel-suite" / "tiles.json"
    module._user_table.cache_clear()


def every_key():
    for arch, block, dim, size, access, rest, way in product(
        (80, 86, 90, 100),
        ((24, 10), (128, 64), (512, 512)),
        (1, 64, 128, 256),
        (2, 4),
        ("plain", "unaligned", "ordered"),
        ("drop", "taylor"),
        ("full", "int8", "fp8"),
    ):
        if (size == 2 or way == "full") and (way != "fp8" or arch >= 89):
            yield tiles_key(
                arch=arch,
                block=block,
                dim=dim,
                element_bytes=size,
                access=access,
                rest=rest,
                arithmetic=way,
            )


def test_sizes_are_filled_up():
    key = tiles_key(arch=90, block=(48, 10), dim=72, element_bytes=2)
    assert (key.q_block, key.kv_block, key.dim) == (64, 16, 128)
    key = tiles_key(arch=90, block=(48, 10), dim=8, element_bytes=2, arithmetic="int8")
    assert (key.q_block, key.kv_block, key.dim) == (64, 32, 32)  # the least an 8-bit product takes


def test_what_is_chosen_fits_every_key():
    for key in every_key():
        for padded in (False, True):
            tiles = choose_tiles(key, padded=padded)
            assert module._fits(tiles, key), (key, tiles)
            assert not tiles.tma or (key.arch == 90 and key.access == "plain")
            assert not tiles.specialized


def test_candidates_fit_and_begin_with_the_choice():
    for key in every_key():
        found = candidates(key)
        assert found[0] == choose_tiles(key)
        assert len(set(found)) == len(found)
        assert all(module._fits(tiles, key) for tiles in found), key
    plain = candidates(KEY)
    assert {(x.tma, x.persistent, x.specialized) for x in plain} == {
        (False, False, False),
        (False, True, False),
        (True, False, False),
        (True, True, False),
        (True, False, True),
        (True, True, True),
    }
    for tiles in plain:
        assert not tiles.specialized or (tiles.tma, tiles.warps, tiles.queries) == (True, 4, 128)
        assert shared_bytes(tiles, KEY) <= SHARED_BYTES[90]
        assert not tiles.registers or (tiles.warps, tiles.specialized) == (8, False)
    assert {x.registers for x in plain} == {0, 128}
    assert not any(x.specialized for x in candidates(KEY._replace(rest="mean")))
    assert not any(x.tma for x in candidates(KEY._replace(arch=89)))


def test_saved_tiles_hold_from_then_on(table):
    assert user_table_path() == table
    ours, theirs = Tiles(64, 32, 8, 2, tma=True), Tiles(32, 32, 4, 3)
    assert choose_tiles(KEY) != ours
    assert save_tiles({KEY: ours}) == table
    assert choose_tiles(KEY) == ours
    save_tiles({OTHER: theirs})
    assert (choose_tiles(KEY), choose_tiles(OTHER)) == (ours, theirs)
    module._user_table.cache_clear()  # as another process
    assert (choose_tiles(KEY), choose_tiles(OTHER)) == (ours, theirs)
    assert choose_tiles(KEY._replace(dim=64)) != ours


def test_tiles_that_are_tried_hold_for_a_block_and_are_not_kept(table):
    rule, tried = choose_tiles(KEY), Tiles(64, 32, 8, 2, tma=True)
    with trying(KEY, tried):
        assert choose_tiles(KEY) == tried
        assert choose_tiles(KEY._replace(dim=64)) != tried
        with ThreadPoolExecutor() as other:
            assert other.submit(choose_tiles, KEY).result() == rule
        assert not table.exists()
    assert choose_tiles(KEY) == rule
    with pytest.raises(KeyboardInterrupt), trying(KEY, tried):
        raise KeyboardInterrupt
    assert choose_tiles(KEY) == rule
    with pytest.raises(ValueError, match="do not fit"), trying(KEY, Tiles(256, 64, 4, 2)):
        pass


def test_specialized_tiles_are_not_for_padded_calls():
    best = Tiles(128, 64, 4, 3, tma=True, specialized=True)
    save_tiles({KEY: best})
    assert choose_tiles(KEY) == best
    assert not choose_tiles(KEY, padded=True).specialized


def test_tiles_that_do_not_fit_are_not_saved():
    with pytest.raises(ValueError, match="do not fit"):
        save_tiles({KEY: Tiles(256, 64, 4, 2)})


def entry(**changes) -> dict:
    return Tiles(64, 32, 8, 2)._asdict() | changes


NAME = "90 128 64 128 2 plain drop full"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[1]",
        b"{" * 10_000,
        b'{"a": ' + b" " * (1 << 20) + b"1}",
        *(
            json.dumps(x).encode()
            for x in (
                {NAME: 3},
                {NAME: entry(warps=7)},
                {NAME: entry(keys=48)},
                {NAME: entry(queries=1 << 40)},
                {NAME: entry(queries=256)},  # more than the block
                {NAME: entry(stages=True)},
                {NAME: entry(tma=1)},
                {NAME: entry(registers=100)},
                {NAME: entry(registers=True)},
                {NAME: entry(warps=4, registers=128)},
                {NAME: entry(more=1)},
                {NAME: {"queries": 64}},
                {"90 128 64 128 2 plain drop": entry()},
                {"90 128 64 128 2 plain drop half": entry()},
                {"090 128 64 128 2 plain drop full": entry()},
                {"90 128 64 ² 2 plain drop full": entry()},
                {"80 128 64 128 2 plain drop full": entry(tma=True)},
            )
        ),
    ],
    ids=lambda content: repr(content[:60]),
)
def test_a_broken_table_is_a_warning_and_no_more(table, content, caplog):
    rule = choose_tiles(KEY)
    table.parent.mkdir(exist_ok=True)
    table.write_bytes(content)
    module._user_table.cache_clear()
    with caplog.at_level(logging.WARNING, "accel"):
        assert choose_tiles(KEY) == rule
        assert choose_tiles(OTHER)
    assert len(caplog.records) == 1
    assert str(table) in caplog.text


def test_good_entries_beside_bad_ones_hold(table, caplog):
    table.parent.mkdir()
    table.write_text(json.dumps({NAME: entry(), "nonsense": entry()}))
    assert choose_tiles(KEY) == Tiles(64, 32, 8, 2)
    assert "'nonsense'" in caplog.text
