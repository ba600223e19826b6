"""The compiled kernels: how they are built, found again, done without, and shared by threads."""

import ast
import logging
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import Backend, Case, check, compiler_missing, run

from accel.kernels import attention_native, native
from accel.kernels.attention import resolve_backend, sparse_attention
from accel.kernels.block_mask import BlockMask
from accel.kernels.block_mass import block_mass
from accel.kernels.reference import block_mass_reference, sparse_attention_reference

CPU = torch.device("cpu")
NATIVE = Backend("native", "cpu")
# what a build is, cheaply: a library without our functions
EMPTY = 'extern "C" int nothing() { return 0; }\n'
NOTICE = "accel builds its CPU kernels"


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
    monkeypatch.setattr(sys, "platform", "linux")
    return tmp_path / "cache" / "accel-suite"


def problem(generator):
    case = Case(2, 4, 2, 200, 200, 40, (64, 32), orders=4, padded=True)
    q, k, v = case.tensors(generator)
    return q, k, v, case.mask(case.dense_keep(generator)), case.options(generator)


def builds(caplog) -> int:
    return sum(record.getMessage().startswith(NOTICE) for record in caplog.records)


def warnings(caplog) -> list[str]:
    """What is amiss; that a build takes seconds is shown too, but is not."""
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    return [message for message in told if not message.startswith(NOTICE)]


def test_a_build_is_found_again(fresh, monkeypatch, caplog):
    assert native.available()
    (first,) = fresh.glob("*.so")
    monkeypatch.setattr(native, "_loaded", [])
    assert native.available()
    assert builds(caplog) == 1
    assert list(fresh.glob("*.so")) == [first]
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
    assert len(list(fresh.glob("*.so"))) == 2


def test_a_failed_build_warns_once_and_torch_does_the_work(fresh, caplog, generator):
    native.SOURCE.write_text("this is not C++\n")
    q, k, v, mask, options = problem(generator)
    assert resolve_backend("auto", CPU) == "cpu"
    out = sparse_attention(q, k, v, mask, **options)
    torch.testing.assert_close(out, sparse_attention(q, k, v, mask, backend="cpu", **options))
    (message,) = warnings(caplog)
    assert "torch is used instead" in message
    assert "this" in message
    assert not list(fresh.glob("*.so"))


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


def test_a_user_without_a_home_builds_too(fresh, monkeypatch, caplog):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(native.Path, "home", nowhere)
    assert native.available()
    assert not fresh.exists()
    assert not warnings(caplog)


def test_a_file_system_without_locks_is_built_on(fresh, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(native.fcntl, "flock", refuse)
    assert native.available()
    assert not warnings(caplog)


def test_a_broken_file_in_the_cache_is_built_again(fresh, caplog):
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
        subprocess.Popen([sys.executable, "-c", program, str(native.SOURCE)], cwd=root)
        for _ in range(2)
    ]
    assert [job.wait(timeout=200) for job in jobs] == [0, 0]
    assert len(list(fresh.glob("*.so"))) == 1


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

    def test_keys_in_one_place_have_values_of_their_own(self, generator):
        q = torch.randn(1, 1, 32, 64, generator=generator)
        k = torch.randn(1, 1, 1, 64, generator=generator).expand(1, 1, 256, 64)
        v = torch.randn(1, 1, 256, 64, generator=generator)
        keep = torch.zeros(1, 1, 8, dtype=torch.bool)
        keep[..., [0, 5]] = True
        mask = BlockMask.from_dense(keep, block=(32, 32), q_length=32, kv_length=256)
        check(NATIVE, q, k, v, mask)

    @pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"), reason="no such switch"
    )
    def test_what_is_too_small_is_nothing_inside_and_stays_outside(self):
        # sharp attention is full of weights like these, and such products take a processor long
        weight, value, tiny = 2.0**-40, 2.0**-100, 2.0**-140
        logit = torch.tensor(weight).log() * 64**0.5
        q, k, v = (torch.zeros(1, 1, tokens, 64) for tokens in (64, 4096, 4096))
        q[..., 0], k[:, :, 1:, 0], v[:, :, 1:] = 1.0, logit, value
        assert v.new_tensor(weight) * value == tiny > 0
        mask = BlockMask.full(block=(64, 64), q_length=64, kv_length=4096, heads=1)
        assert (sparse_attention(q, k, v, mask, backend="native") == 0).all()
        # in every thread
        assert (torch.full((1 << 20,), value) * weight == tiny).all()

    def test_tensors_elsewhere_are_refused(self):
        q = torch.randn(1, 1, 32, 64, device="meta")
        with pytest.raises(ValueError, match="q is on meta; move it, or take backend='auto'"):
            attention_native.block_mass(
                q, q, block=(32, 32), scale=1.0, lse=None, lengths=None, order=None
            )

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


@pytest.mark.usefixtures("compiled")
class TestIntegers:
    """Half precision in 16-bit integers: exact enough whatever the tensors hold."""

    @pytest.fixture(autouse=True)
    def _here(self, compiled):
        if not native.has_integers():
            pytest.skip("this processor has no quick products of 16-bit integers")

    @staticmethod
    def error(got, truth):
        return ((got.double() - truth).norm() / truth.norm()).item()

    @pytest.mark.parametrize("rest", ["drop", "mean", "taylor"])
    def test_half_is_allowed_and_used(self, rest, generator):
        q, k, v, mask, options = problem(generator)
        truth = sparse_attention_reference(q, k, v, mask, rest=rest, **options)
        full, half = (
            sparse_attention(
                q, k, v, mask, rest=rest, precision=precision, backend="native", **options
            )
            for precision in ("full", "half")
        )
        assert self.error(full, truth) < 1e-6
        assert 1e-5 < self.error(half, truth) < 6e-4

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("dim", [1, 2, 33, 72, 129, 256])
    def test_every_head_dim(self, dim, dtype, generator):
        case = Case(1, 2, 1, 77, 131, dim, (32, 16), padded=True)
        q, k, v = case.tensors(generator, dtype)
        mask = case.mask(case.dense_keep(generator))
        check(NATIVE, q, k, v, mask, rest="taylor", **case.options(generator))

    @pytest.mark.parametrize("what", ["a channel", "a token", "a value", "everything"])
    def test_outliers(self, what, generator):
        case = Case(1, 2, 2, 128, 320, 64, (64, 32))
        q, k, v = case.tensors(generator)
        if what == "a channel":
            k[..., 5] += 60
        elif what == "a token":
            k[:, :, 7] *= 40
        elif what == "a value":
            v[:, :, 7, 3] = 300
        else:
            q, k, v = q * 8, k * 8, v * 1000
        q, k, v = (x.bfloat16() for x in (q, k, v))
        check(NATIVE, q, k, v, case.mask(case.dense_keep(generator)), rest="mean")

    def test_mass_in_many_small_weights(self):
        """Each is below what 13 bits resolve beside the largest, together they are a quarter."""
        tokens = 8192
        q = torch.ones(1, 1, 16, 16)
        k = torch.full((1, 1, tokens, 16), -0.625)
        k[:, :, 100] = 0
        v = torch.ones(1, 1, tokens, 16)
        v[:, :, 100] = -1
        q, k, v = (x.bfloat16() for x in (q, k, v))
        mask = BlockMask.full(1, block=(16, 64), q_length=16, kv_length=tokens)
        truth = sparse_attention_reference(q, k, v, mask, scale=1.0)
        out = sparse_attention(q, k, v, mask, scale=1.0, backend="native")
        assert -0.47 < truth.min() <= truth.max() < -0.44
        # those of the step with the large one are lost; -1 if all were
        torch.testing.assert_close(out.double(), truth, atol=5e-3, rtol=0)

    @pytest.mark.parametrize("dim", [1, 64, 256])
    def test_largest_products_do_not_overflow(self, dim):
        """Rows of equal elements have the largest sums that their norms allow."""
        q = torch.full((1, 1, 16, dim), 3.0)
        k = torch.full((1, 1, 64, dim), 3.0)
        k[:, :, ::2] *= -1
        v = torch.arange(64.0)[:, None].expand(1, 1, 64, dim).contiguous()
        mask = BlockMask.full(1, block=(16, 64), q_length=16, kv_length=64)
        scale = 1 / (9 * dim)
        truth = sparse_attention_reference(q, k, v, mask, scale=scale)
        out = sparse_attention(q, k, v, mask, scale=scale, precision="half", backend="native")
        assert self.error(out, truth) < 5e-4

    @pytest.mark.parametrize("size", [30.0, 31.7, 100.0])
    def test_large_logits_do_not_overflow(self, size):
        """Where a float has no places left behind the point, weights still end at 1."""
        q, k = torch.full((1, 1, 16, 64), size), torch.full((1, 1, 64, 64), size)
        v = torch.ones(1, 1, 64, 64)
        mask = BlockMask.full(1, block=(16, 64), q_length=16, kv_length=64)
        for scale in torch.linspace(0.3, 0.6, 40).tolist():
            out = sparse_attention(q, k, v, mask, scale=scale, precision="half", backend="native")
            assert self.error(out, torch.ones_like(out).double()) < 1e-3

    def test_what_is_not_finite_stays_where_it_is(self, generator):
        case = Case(1, 2, 2, 64, 64, 32, (16, 16))
        q, k, v = (x.bfloat16() for x in case.tensors(generator))
        keep = torch.ones(2, 4, 4, dtype=torch.bool)
        keep[:, 0, 3] = False
        q[0, 0, 5, 1] = torch.inf
        v[0, 1, 60, 2] = torch.nan
        out, lse = run(NATIVE, q, k, v, case.mask(keep))
        bad = torch.zeros_like(out, dtype=torch.bool)
        bad[0, 0, 5] = True
        bad[0, 1, 16:, 2] = True
        assert torch.equal(out.isnan(), bad)
        assert lse[0, 0, 5].isnan()

    def test_block_mass(self, generator):
        case = Case(3, 6, 2, 111, 111, 72, (64, 32), orders=6, padded=True)
        q, k, _ = case.tensors(generator, torch.bfloat16)
        options = case.options(generator) | {"block": case.block}
        truth = block_mass_reference(q, k, **options)
        mass, lse = block_mass(q, k, **options)
        again, _ = block_mass(q, k, lse=lse, **options)
        for found in (mass, again):
            torch.testing.assert_close(found.double(), truth[0], atol=5e-3, rtol=1e-3)
        finite = truth[1].isfinite()
        torch.testing.assert_close(lse.double()[finite], truth[1][finite], atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The kernels with the layout of AVX-512, on whatever vectors there are."""
    if reason := compiler_missing():
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("wide") / "wide.so"
    native.build(native._compiler(), path, "-DACCEL_LANES=16", "-O1")
    return native.ctypes.CDLL(str(path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [(16, 16), (48, 24), (64, 64), (128, 96)], ids=str)
def test_the_layout_of_wider_vectors(wide, block, dtype, monkeypatch, generator):
    monkeypatch.setattr(native, "_loaded", [wide])
    case = Case(2, 6, 2, 333, 333, 72, block, orders=6, padded=True)
    q, k, v = case.tensors(generator, dtype)
    mask, options = case.mask(case.dense_keep(generator)), case.options(generator)
    check(NATIVE, q, k, v, mask, rest=["drop", "mean", "taylor"] * 2, **options)
    truth = block_mass_reference(q, k, block=block, **options)[0]
    found = block_mass(q, k, block=block, **options)[0]
    torch.testing.assert_close(found.double(), truth, atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("processor", "instruction"),
    [
        ("icelake-server", r"vpdpwssd\s.*%zmm"),
        pytest.param("haswell", r"vpmaddwd\s.*%ymm", marks=pytest.mark.slow),
        pytest.param("skylake-avx512", r"vpmaddwd\s.*%zmm", marks=pytest.mark.slow),
        pytest.param("x86-64", r"mulps\s", marks=pytest.mark.slow),
    ],
)
def test_compiles_for_other_processors(processor, instruction, tmp_path, compiled):
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("compiles for x86 only")
    flags = [f for f in native.FLAGS if f not in ("-march=native", "-shared")]
    assembly = tmp_path / "kernels.s"
    subprocess.run(
        [native._compiler(), *flags, f"-march={processor}", "-S", native.SOURCE, "-o", assembly],
        check=True,
        capture_output=True,
    )
    assert re.search(instruction, assembly.read_text())


STARVED = """
import resource
import torch
from accel.kernels.attention import sparse_attention
from accel.kernels.block_mask import BlockMask
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
