"""A checkout, an editable install and the wheel are the same package."""

import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no reader of TOML")

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("pipelines", "search", "kernels", "configs")
# the packages inside a folder; one that is not named here would be missing from the wheel
NESTED = {"accel": ["estimators", "recipes"], "pipelines": ["bench"]}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _git(*arguments):
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_lead_to_the_folders(folder):
    link = ROOT / "accel" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder
    assert link.resolve() == ROOT / folder


def test_the_map_of_the_wheel_names_every_folder():
    """The groups of the configuration too: setuptools takes a folder with files for a package."""
    groups = sorted(p.name for p in (ROOT / "configs").iterdir() if any(p.glob("*.yaml")))
    folders = {f"accel.{package}": f"accel/{package}" for package in NESTED["accel"]}
    for name in FOLDERS:
        inner = [f"{name}/{package}" for package in NESTED.get(name, ())]
        folders |= {f"accel.{path.replace('/', '.')}": path for path in (name, *inner)}
    folders |= {f"accel.configs.{name}": f"configs/{name}" for name in groups}
    setuptools = PROJECT["tool"]["setuptools"]
    assert setuptools["packages"] == ["accel", *folders]
    assert setuptools["package-dir"] == {"accel": "accel", **folders}


@pytest.mark.parametrize("folder", ["accel", *FOLDERS])
def test_no_folder_has_packages_but_those_that_are_named(folder):
    nested = sorted(
        p.name
        for p in (ROOT / folder).iterdir()
        if p.is_dir() and not p.is_symlink() and any(p.glob("*.py"))
    )
    assert nested == NESTED.get(folder, [])


def test_huggingface_kernels_is_not_shadowed_from_the_checkout():
    program = (
        "import importlib.util; spec = importlib.util.find_spec('kernels');"
        f"assert spec is None or not (spec.origin or '').startswith({str(ROOT)!r}), spec"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(("name", "target"), PROJECT["project"]["scripts"].items())
def test_commands_lead_to_functions(name, target):
    module, function = target.split(":")
    assert callable(getattr(import_module(module), function))


def test_the_installed_package_is_this_checkout():
    import accel

    assert Path(accel.__file__).parent == ROOT / "accel"
    assert PROJECT["project"]["version"] == accel.__version__


@pytest.fixture(scope="module")
def tracked():
    """Every tracked file that belongs into the wheel, by its path in the package."""
    listed = _git("ls-files", "accel", *FOLDERS)
    if listed is None:
        pytest.skip("this is no git checkout, so which files belong to it is not known")
    wanted = {}
    for name in listed.splitlines():
        path = Path(name)
        if (ROOT / path).is_symlink() or not (ROOT / path).is_file():
            continue
        home = path if path.parts[0] == "accel" else Path("accel") / path
        wanted[str(home)] = path
    return wanted


@pytest.fixture(scope="module")
def wheel(tracked, tmp_path_factory):
    """The names in the wheel that is built from a clean copy of the tracked files."""
    pytest.importorskip("setuptools", reason="setuptools builds the wheel")
    copy = tmp_path_factory.mktemp("checkout")
    for path in (*tracked.values(), Path("pyproject.toml"), *map(Path, _root_files())):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes((ROOT / path).read_bytes())
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = (copy / "dist").glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def _root_files():
    project = PROJECT["project"]
    return [f for f in (project["readme"], *project["license-files"]) if (ROOT / f).exists()]


def test_the_wheel_holds_every_file_of_the_checkout(tracked, wheel):
    assert sorted(set(tracked) - wheel) == []


def test_the_wheel_holds_nothing_else(tracked, wheel):
    assert sorted(n for n in wheel - set(tracked) if ".dist-info/" not in n) == []


def test_the_wheel_holds_the_configurations(wheel):
    configs = {f"accel/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.yaml")}
    tracked = {f"accel/{n}" for n in (_git("ls-files", "configs") or "").splitlines()}
    assert configs & tracked
    assert configs & tracked <= wheel
