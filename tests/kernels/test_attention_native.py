"""The compiled kernels: how they are built, found again, done without, and shared by threads."""

import ast
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import Backend, Case, check, compiler_missing, run

from accel.kernels import native
from accel.kernels.attention import resolve_backend, sparse_attention
from accel.kernels.block_mass import block_mass
from accel.kernels.reference import block_mass_reference

CPU = torch.device("cpu")
NATIVE = Backend("native", "cpu")
# what a build is, cheaply: a library without our functions
EMPTY = 'extern "C" int nothing() { return 0; }\n'


@pytest.fixture
def compiled():
    if reason := compiler_missing():
        pytest.skip(reason)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not loaded anything, with an empty cache and a tiny source."""
    if reason := compiler_missing():
        pytest.skip(reason)
    source = tmp_path / "attention_native.cpp"
    source.write_text(EMPTY)
    monkeypatch.setattr(native, "SOURCE", source)
    monkeypatch.setattr(native, "_loaded", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native.sys, "platform", "linux")
    return tmp_path / "cache" / "accel-suite"


def problem(generator):
    case = Case(2, 4, 2, 200, 200, 40, (64, 32), orders=4, padded=True)
    q, k, v = case.tensors(generator)
    return q, k, v, case.mask(case.dense_keep(generator)), case.options(generator)


def builds(caplog) -> int:
    return sum(record.getMessage().startswith("building") for record in caplog.records)


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_build_is_found_again(fresh, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "accel")
    assert native.available()
    (first,) = fresh.iterdir()
    monkeypatch.setattr(native, "_loaded", [])
    assert native.available()
    assert builds(caplog) == 1
    assert list(fresh.iterdir()) == [first]
    assert not warnings(caplog)


@pytest.mark.parametrize("what", ["source", "flags", "processor"])
def test_another_source_flag_or_processor_is_another_build(fresh, what, monkeypatch):
    assert native.available()
    monkeypatch.setattr(native, "_loaded", [])
    if what == "source":
        native.SOURCE.write_text(EMPTY + "// changed\n")
    elif what == "flags":
        monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-g"))
    else:
        monkeypatch.setattr(native, "_processor", lambda: "another")
    assert native.available()
    assert len(list(fresh.iterdir())) == 2


def test_a_failed_build_warns_once_and_torch_does_the_work(fresh, caplog, generator):
    native.SOURCE.write_text("this is not C++\n")
    q, k, v, mask, options = problem(generator)
    assert resolve_backend("auto", CPU) == "cpu"
    out = sparse_attention(q, k, v, mask, **options)
    torch.testing.assert_close(out, sparse_attention(q, k, v, mask, backend="cpu", **options))
    (message,) = warnings(caplog)
    assert "torch is used instead" in message
    assert "this" in message
    assert not list(fresh.iterdir())


@pytest.mark.parametrize("compiler", ["false", "/nowhere/g++"])
def test_a_broken_compiler_warns_once(fresh, compiler, monkeypatch, caplog):
    monkeypatch.setattr(native, "_compiler", lambda: compiler)
    assert resolve_backend("auto", CPU) == "cpu"
    assert resolve_backend("auto", CPU) == "cpu"
    assert len(warnings(caplog)) == 1


def test_without_a_compiler_it_is_torch_and_no_warning(fresh, monkeypatch, caplog):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert resolve_backend("auto", CPU) == "cpu"
    assert not warnings(caplog)


def test_asking_for_what_cannot_be_built_raises(fresh, monkeypatch, generator):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    q, k, v, mask, options = problem(generator)
    with pytest.raises(RuntimeError, match="compiled kernels are not available"):
        sparse_attention(q, k, v, mask, backend="native", **options)


def test_a_cache_that_cannot_be_written_is_done_without(fresh, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native.available()
    assert not warnings(caplog)


def test_a_cache_that_others_can_write_to_is_not_used(fresh):
    """A library is code: whoever may put one there could run as us."""
    fresh.mkdir(parents=True)
    fresh.chmod(0o777)
    with native._cache_folder() as folder:
        assert folder != fresh
    fresh.chmod(0o700)
    with native._cache_folder() as folder:
        assert folder == fresh


def test_a_broken_file_in_the_cache_is_built_again(fresh, caplog):
    caplog.set_level(logging.INFO, "accel")
    fresh.mkdir(parents=True)
    (fresh / f"{native._key(native._compiler())}.so").write_text("cut short")
    assert native.available()
    assert builds(caplog) == 1
    assert not warnings(caplog)


def test_processes_may_build_at_the_same_time(fresh):
    program = (
        "import pathlib, sys; from accel.kernels import native; "
        "native.SOURCE = pathlib.Path(sys.argv[1]); sys.exit(not native.available())"
    )
    root = Path(__file__).parents[2]
    jobs = [
        subprocess.Popen([native.sys.executable, "-c", program, str(native.SOURCE)], cwd=root)
        for _ in range(2)
    ]
    assert [job.wait(timeout=200) for job in jobs] == [0, 0]
    assert len(list(fresh.iterdir())) == 1


@pytest.mark.usefixtures("compiled")
class TestCompiled:
    def test_it_is_what_auto_means_on_the_cpu(self):
        assert resolve_backend("auto", CPU) == "native"

    def test_threads_change_nothing(self, generator):
        q, k, v, mask, options = problem(generator)
        threads, results = torch.get_num_threads(), []
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                results.append(
                    [
                        *run(NATIVE, q, k, v, mask, rest=["drop", "mean"] * 2, **options),
                        *block_mass(q, k, block=(64, 32), **options),
                    ]
                )
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(map(torch.equal, other, results[0]))

    @pytest.mark.parametrize(
        "block", [(16, 16), (64, 64), (128, 64), (256, 128), (128, 512), (4096, 4096)]
    )
    def test_more_keys_and_queries_than_one_step_takes(self, block, generator):
        case = Case(1, 2, 1, 700, 900, 33, block, keep=0.6)
        q, k, v = case.tensors(generator)
        mask = case.mask(case.dense_keep(generator))
        check(NATIVE, q, k, v, mask, rest=["mean", "drop"])
        mass, lse = block_mass(q, k, block=block)
        truth = block_mass_reference(q, k, block=block)
        torch.testing.assert_close(mass.double(), truth[0], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(lse.double(), truth[1], atol=2e-5, rtol=2e-5)

    def test_every_head_dim(self, generator):
        for dim in (1, 2, 7, 15, 16, 17, 31, 48, 63, 65, 96, 129, 256):
            case = Case(1, 2, 1, 40, 50, dim, (32, 16))
            q, k, v = case.tensors(generator)
            check(NATIVE, q, k, v, case.mask(case.dense_keep(generator)), rest="mean")

    def test_an_order_outside_the_sequence_is_refused(self, generator):
        q, k, v, mask, _ = problem(generator)
        with pytest.raises(IndexError, match=r"0\.\.199, got 1\.\.200"):
            sparse_attention(q, k, v, mask, order=torch.arange(1, 201), backend="native")

    def test_gradients_are_refused(self, generator):
        q, k, v, mask, options = problem(generator)
        with pytest.raises(NotImplementedError, match="no gradients"):
            sparse_attention(q.requires_grad_(), k, v, mask, backend="native", **options)
        with torch.no_grad():
            sparse_attention(q, k, v, mask, backend="native", **options)


STARVED = """
import resource
import torch
from accel.kernels.attention import sparse_attention
from accel.kernels.block_mask import BlockMask
from accel.kernels.block_mass import block_mass

torch.set_num_threads(2)
q, k, v = (torch.randn(1, 1, tokens, 64) for tokens in (64, 40_000, 40_000))
mask = BlockMask.from_dense(
    torch.rand(1, 1, 1, 2500) < 0.5, block=(64, 16), q_length=64, kv_length=40_000
)

def calls():
    sparse_attention(q, k, v, mask, rest="mean", backend="native")
    block_mass(q, k, block=(64, 16))

def used():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

calls()  # threads are there, and the libraries
ended = {"done": 0, "starved": 0}
for spare in range(0, 48 * 2**20, 2**20):
    resource.setrlimit(resource.RLIMIT_AS, (used() + spare, resource.RLIM_INFINITY))
    try:
        calls()
        ended["done"] += 1
    except (MemoryError, RuntimeError):
        ended["starved"] += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
calls()
print(ended)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_want_of_memory_in_any_thread_is_an_error_and_no_abort(compiled):
    ran = subprocess.run(
        [sys.executable, "-c", STARVED], capture_output=True, text=True, check=False, timeout=240
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    ended = ast.literal_eval(ran.stdout)
    assert ended["starved"] > 0
