"""The version of treespec, and of the packages that a result depends on."""

from __future__ import annotations

__version__ = "0.1.0"


def versions(*packages: str) -> dict[str, str]:
    """Of treespec and of `packages` by their names on PyPI: "not installed" where there is none."""
    # NOTE treespec's own is not asked for by name: a checkout that is not installed has no metadata.
    return {"treespec": __version__} | {package: _version(package) for package in packages}


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
