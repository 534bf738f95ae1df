"""What an install gives, seen from outside the checkout: wheel, editable install, sdist.

Everything is built from a copy of the tree, so that nothing is left in the checkout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LITTER = (".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis", "build", "dist", "*.egg-info")
DATA_SUFFIXES = {".cpp", ".css", ".h", ".jinja", ".html", ".js", ".json", ".md", ".safetensors", ".txt"}


def run(*command: object, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    result = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout.strip()


def new_environment(folder: Path) -> Path:
    """A virtual environment that also sees what is installed in this one; returns its Python."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    # NOTE: only the path is added; .pth files of this environment (an editable treespec) are not read again.
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def pip_install(python: Path, *arguments: object, cwd: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", "--no-build-isolation", "--force-reinstall", *arguments, cwd=cwd)


def build(kind: str, source: Path, out: Path) -> Path:
    """Runs the build backend's hook `build_wheel` or `build_sdist` in `source`."""
    out.mkdir(exist_ok=True)
    name = run(
        sys.executable, "-c", f"import setuptools.build_meta as b; print(b.build_{kind}({str(out)!r}))", cwd=source
    )
    return out / name.splitlines()[-1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def source(place: Path) -> Path:
    return shutil.copytree(ROOT, place / "source", symlinks=True, ignore=shutil.ignore_patterns(*LITTER))


@pytest.fixture(scope="module")
def wheel(source: Path, place: Path) -> Path:
    return build("wheel", source, place / "wheel")


@pytest.fixture(scope="module", params=["wheel", "editable"])
def python(request: pytest.FixtureRequest, source: Path, place: Path) -> Path:
    """Python of an environment with treespec installed, one way or the other."""
    python = new_environment(place / f"{request.param}-environment")
    if request.param == "wheel":
        pip_install(python, request.getfixturevalue("wheel"), cwd=place)
    else:
        pip_install(python, "-e", source, cwd=place)
    return python


def expected_files(source: Path) -> set[str]:
    """Paths inside the wheel of everything the package is made of, links followed."""
    found = set()
    for top, prefix in (("treespec_compiler", ""), ("passes", "treespec_compiler/"), ("codegen", "treespec_compiler/")):
        for path in (source / top).rglob("*"):
            name = path.relative_to(source).as_posix()
            # rglob does not descend into links, but lists them
            if path.is_file() and path.suffix in {".py", ".typed", *DATA_SUFFIXES} and "__pycache__" not in name:
                found.add(prefix + name)
    return found


def test_wheel_holds_every_source_and_data_file_once(source: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entries = [entry for entry in archive.infolist() if ".dist-info/" not in entry.filename]
        # A link would be stored as its target's path; mode bits tell (0o120000 is a symbolic link).
        assert all((entry.external_attr >> 16) & 0o170000 != 0o120000 for entry in entries)
        assert {entry.filename for entry in entries} == expected_files(source)
        assert "treespec_compiler/py.typed" in archive.namelist()
        assert archive.read("treespec_compiler/passes/__init__.py") == (source / "passes/__init__.py").read_bytes()
        for entry in entries:
            if entry.filename.endswith((".cpp", ".safetensors")):
                assert entry.file_size > 0, entry.filename


@pytest.mark.rare
def test_sdist_builds_the_same_wheel(source: Path, wheel: Path, place: Path) -> None:
    sdist = build("sdist", source, place / "sdist")
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4
        archive.extractall(place / "unpacked", **safely)
    (unpacked,) = (place / "unpacked").iterdir()
    again = build("wheel", unpacked, place / "wheel-of-sdist")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


def test_subpackages_are_never_top_level_modules(python: Path, place: Path) -> None:
    program = """
import importlib, importlib.util
for name in ("passes", "codegen"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit(f"{name} is a top-level module")
    module = importlib.import_module(f"treespec_compiler.{name}")
    assert module.__name__ == f"treespec_compiler.{name}", module
import treespec_compiler
print(treespec_compiler.__file__)
"""
    outside = place / "outside"
    outside.mkdir(exist_ok=True)
    where = Path(run(python, "-c", program, cwd=outside))
    assert ROOT not in where.parents and place in where.parents


def test_kernels_are_generated_from_the_installed_template(python: Path, place: Path) -> None:
    program = """
import torch
from treespec_compiler.codegen.gpu.tree_attention_source import source
from treespec_compiler.codegen.gpu.tree_attention_spec import AttentionKernel
text = source(AttentionKernel(4, 2, 16, 16, torch.float32, torch.float32))
assert "def attend(" in text and "{%" not in text
compile(text, "kernel.py", "exec")
"""
    run(python, "-c", program, cwd=place)


def test_import_is_light(python: Path, place: Path) -> None:
    program = """
import sys, treespec_compiler
heavy = {"triton", "transformers", "tokenizers", "torch._inductor"} & set(sys.modules)
assert not heavy, heavy
treespec_compiler.TokenTree.chain([1, 2])
assert set(treespec_compiler.__all__) <= set(dir(treespec_compiler))
heavy = {"triton", "transformers", "tokenizers", "torch._inductor"} & set(sys.modules)
assert not heavy, heavy
"""
    run(python, "-c", program, cwd=place)


def test_backend_is_listed_without_importing_treespec(python: Path, place: Path) -> None:
    program = """
import sys, torch
assert "treespec" in torch._dynamo.list_backends(exclude_tags=None)
assert not [name for name in sys.modules if name.startswith("treespec")]
"""
    run(python, "-c", program, cwd=place)


def test_command_line_is_installed(python: Path, place: Path) -> None:
    assert run(python.parent / "treespec", "--version", cwd=place).startswith("treespec ")
