"""Links of the documentation lead somewhere."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_CODE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return _CODE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return what a link may name after #, as GitHub makes it of headings."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = found.get(name, 0)
        found[name] = count + 1
        names.add(f"{name}-{count}" if count else name)
    return names


def targets(page: Path) -> Iterator[tuple[str, Path, str]]:
    """Yield (link, file, heading) of every relative link of a page."""
    for link in _LINK.findall(prose(page)):
        if not re.match(r"[a-z][a-z0-9+.-]*:", link):
            path, _, anchor = link.partition("#")
            yield link, (page.parent / path).resolve() if path else page, anchor


def broken_links(page: Path, root: Path = ROOT) -> list[str]:
    """Return the relative links of a page that lead nowhere, or out of the repository."""
    return [
        link
        for link, file, anchor in targets(page)
        if not file.exists()
        or root not in (file, *file.parents)
        or (anchor and file.suffix == ".md" and anchor not in anchors(file))
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    """Every relative link names a file of the repository, and a heading that it has."""
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    """The check itself can fail: missing files, missing headings, and paths out of the repository."""
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b` c\n\n[x](#a-b-c) [y](#nope) [z](gone.md) [w](https://example.com/)\n\n```\n[c](code.md)\n```\n"
    )
    assert broken_links(page, tmp_path) == ["#nope", "gone.md"]


def test_every_page_can_be_reached() -> None:
    """Following links from the README leads to every page."""
    seen: set[Path] = set()
    open_ends = [ROOT / "README.md"]
    while open_ends:
        page = open_ends.pop()
        if page not in seen and page.suffix == ".md" and page.exists():
            seen.add(page)
            open_ends += [file for _, file, _ in targets(page)]
    assert set(PAGES) <= seen
