"""The published page of a code, read from its check's docstring without importing torch."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path

from safeloop.checks.registry import FILES
from safeloop.faults import Severity

SECTIONS = ("What it does", "Why it is bad", "Bad", "Good", "Fix", "Source")
"""The headings of a page, in order."""

_HERE = Path(__file__).parent
_BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


class UnknownCodeError(LookupError):
    """There is no such code; `nearest` holds those that look like it."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.nearest = nearest(code)
        super().__init__(f"no code {code}" + (f"; close to it: {', '.join(self.nearest)}" if self.nearest else ""))

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Example:
    """A code block of a page."""

    language: str
    text: str


@dataclass(frozen=True)
class Page:
    """What is published about one code."""

    code: str
    name: str
    """the check's class"""
    title: str
    severity: Severity
    summary: str
    sections: tuple[tuple[str, str], ...]
    """heading and markdown, in order"""
    file: str
    """below `safeloop/checks/`"""

    @property
    def bad(self) -> Example:
        """The example that ends in this code."""
        return self._example("Bad")

    @property
    def good(self) -> Example:
        """The example that ends in no fault."""
        return self._example("Good")

    def _example(self, heading: str) -> Example:
        found = _BLOCK.search(dict(self.sections).get(heading, ""))
        if found is None:
            raise ValueError(f"{self.code} ({self.file}): the section `{heading}` holds no code block")
        return Example(found["language"], found["text"])


def page(code: str) -> Page:
    """The page of a code, in any case of letters.

    Raises:
        UnknownCodeError: with the nearest codes.
        ValueError: the file that the registry names has no class of this code, or its docstring is no page.
    """
    wanted = code.strip().upper()
    if wanted not in FILES:
        raise UnknownCodeError(wanted)
    tree = ast.parse((_HERE / FILES[wanted]).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and _constants(node).get("code") == wanted:
            return _page(node, FILES[wanted])
    raise ValueError(f"{FILES[wanted]} has no check of code {wanted}")


def nearest(code: str) -> list[str]:
    """Up to three codes that look like `code`."""
    word = code.strip().upper()
    word = word[:2] + word[2:].replace("O", "0").replace("I", "1")  # letters that were read for digits
    return difflib.get_close_matches(word, FILES, n=3, cutoff=0.5)


def render(shown: Page) -> str:
    """The page as markdown, which also reads well on a terminal."""
    severity = "" if shown.severity == "error" else f" ({shown.severity})"
    parts = [f"# {shown.code} {shown.title}{severity}", shown.summary]
    parts += [f"## {heading}\n\n{body}" for heading, body in shown.sections]
    return "\n\n".join(parts) + "\n"


def _constants(node: ast.ClassDef) -> dict[str, str]:
    found: dict[str, str] = {}
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
        value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            found.update({target.id: value.value for target in targets if isinstance(target, ast.Name)})
    return found


def _page(node: ast.ClassDef, file: str) -> Page:
    constants = _constants(node)
    summary, *rest = re.split(r"^## +(.+)$", inspect.cleandoc(ast.get_docstring(node) or ""), flags=re.MULTILINE)
    headings, bodies = rest[::2], rest[1::2]
    if tuple(headings) != SECTIONS:
        raise ValueError(
            f"{constants['code']} ({file}): a page has the sections {SECTIONS}, this one {tuple(headings)}"
        )
    return Page(
        code=constants["code"],
        name=node.name,
        title=constants.get("title", ""),
        severity="warning" if constants.get("severity") == "warning" else "error",
        summary=summary.strip(),
        sections=tuple((heading, body.strip()) for heading, body in zip(headings, bodies, strict=True)),
        file=file,
    )
