"""`python -m tools.reference`: write the generated pages of docs/; --check tells if they are stale."""

import argparse
import sys
from pathlib import Path

from tools.reference.configuration import configuration_page
from tools.reference.metrics import metrics_page
from tools.reference.protocol import protocol_page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "docs/configuration.md": configuration_page,
    "docs/metrics.md": metrics_page,
    "docs/protocol.md": protocol_page,
}


def stale_pages() -> list[str]:
    """Return the pages that differ from what the code says."""
    return [path for path, page in PAGES.items() if (ROOT / path).read_text(encoding="utf-8") != page(ROOT)]


def main() -> int:
    """Write every page, or check them; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.reference", description="Write the generated pages of docs/."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a page is stale")
    if parser.parse_args().check:
        stale = stale_pages()
        if stale:
            sys.stderr.write(f"{', '.join(stale)}: differ from the code; run `make docs`\n")
        return 1 if stale else 0
    for path, page in PAGES.items():
        (ROOT / path).write_text(page(ROOT), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
