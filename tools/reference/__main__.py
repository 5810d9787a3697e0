"""`python -m tools.reference`: write docs/configuration.md and docs/protocol.md."""

from pathlib import Path

from tools.reference.configuration import configuration_page
from tools.reference.protocol import protocol_page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"docs/configuration.md": configuration_page, "docs/protocol.md": protocol_page}


def main() -> None:
    """Write every page."""
    for path, page in PAGES.items():
        (ROOT / path).write_text(page(ROOT), encoding="utf-8")


if __name__ == "__main__":
    main()
