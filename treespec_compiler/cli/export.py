"""Write the folder that `model.generate(..., custom_generate="DIR")` of transformers takes."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

EPILOG = """\
example:
  treespec export-custom-generate my-model
  python -c "model.generate(**inputs, custom_generate='my-model', trust_remote_code=True, draft='ngram')"

Uploaded beside a model's weights, the folder makes the same call work by the model's name.
"""

GENERATE = '''\
"""Decoding by speculation, with the output of the model's own `generate`: needs the package `treespec`."""

from treespec_compiler.serving.hf import generate as generate
'''

README = """\
# Decoding with treespec

    pip install treespec
    model.generate(**inputs, custom_generate="FOLDER_OR_REPO", trust_remote_code=True, draft="ngram")

The ids are those of `model.generate` without it (sampled: from the same distribution), in fewer passes of the model.
`draft`: "ngram", "early-exit", a smaller model, or a list of them. All of `generation_config` is honoured or refused.
"""


def configure(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("folder", metavar="DIR", type=Path, help="where custom_generate/ is written; made if missing")


def run(arguments: Namespace) -> int:
    folder = arguments.folder / "custom_generate"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("generate.py", GENERATE), ("README.md", README)):
        (folder / name).write_text(text, encoding="utf-8")
    print(folder / "generate.py")
    return 0
