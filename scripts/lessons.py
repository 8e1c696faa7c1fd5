"""Runs the pages under `docs/lessons/` and writes under each block of code what it prints.

`python scripts/lessons.py` rewrites them; `--check` says which are stale and exits with 1. On a machine without an
accelerator, since a plan names the kernels that it uses.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

PAGES = Path(__file__).parents[1] / "docs" / "lessons"
EXAMPLE = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n*```text\n.*?^```\n)?", re.MULTILINE | re.DOTALL)


def rewritten(text: str) -> str:
    """A page with the output of each block as it is now; run in the working directory, as one file `example.py`."""
    names: dict[str, object] = {"__name__": "__main__"}
    file, so_far = Path("example.py"), ""
    torch.manual_seed(0)

    def run(match: re.Match[str]) -> str:
        nonlocal so_far
        code, above = match["code"], so_far.count("\n")
        so_far += code
        file.write_text(so_far, encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            exec(compile("\n" * above + code, file.name, "exec"), names)
        output = shown.getvalue()
        return f"```python\n{code}```\n" + (f"\n```text\n{output}```\n" if output else "")

    return EXAMPLE.sub(run, text)


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main(arguments: list[str]) -> int:
    """Rewrite or check every page."""
    stale = []
    for page in sorted(PAGES.glob("[0-9]*.md")):
        text = page.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder, _inside(folder):
            new = rewritten(text)
        if new != text:
            stale.append(page.name)
            if "--check" not in arguments:
                page.write_text(new, encoding="utf-8")
    if stale:
        print("stale:" if "--check" in arguments else "rewritten:", ", ".join(stale))
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
