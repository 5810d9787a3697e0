"""Training text that every Python brings along: the language reference in `pydoc_data` and the library's docstrings."""

import ast
import functools
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Tests and tables: their docstrings are not prose about Python.
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "distutils",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
_MIN_PARAGRAPH_CHARS = 40
_MIN_PROSE_SHARE = 0.85
_NOT_PROSE = re.compile(r"[^A-Za-z ,.]")
_MARKUP = re.compile(r":[a-z:]+:(?=`)|[*`]+|(?<=\w)_\b|-{3,}|={3,}|~{3,}|\^{3,}")


@dataclass(slots=True, frozen=True)
class Document:
    """Paragraphs of prose about one name: a statement, a module, a function."""

    title: str
    paragraphs: tuple[str, ...]


@functools.cache
def load_corpus() -> tuple[Document, ...]:
    """Return the documents of this Python in a fixed order, without repeated paragraphs. Takes seconds, once."""
    seen: set[str] = set()
    documents = []
    for title, text in (*_reference(), *_docstrings()):
        paragraphs = []
        for paragraph in _prose(text):
            if paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
        if paragraphs:
            documents.append(Document(title, tuple(paragraphs)))
    return tuple(documents)


def _reference() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


def _docstrings() -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts):
            module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):  # some Pythons ship templates that are not modules
                continue
            yield from _docstrings_of(tree, module)


def _docstrings_of(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str]]:
    if text := ast.get_docstring(node):
        yield name, text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings_of(child, f"{name}.{child.name}")


def _prose(text: str) -> Iterator[str]:
    """Yield the paragraphs that read like sentences, each on one line; leave out code, tables and signatures."""
    for block in re.split(r"\n\s*\n", text):
        if ">>>" in block:
            continue
        paragraph = " ".join(_MARKUP.sub("", block).split())
        odd = len(_NOT_PROSE.findall(paragraph))
        if len(paragraph) >= _MIN_PARAGRAPH_CHARS and odd <= (1 - _MIN_PROSE_SHARE) * len(paragraph):
            yield paragraph
