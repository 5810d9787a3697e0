"""The generated pages say what the code says."""

import re

import pytest

from services.common.config import load_config
from tools.reference.__main__ import PAGES, ROOT
from tools.reference.configuration import SERVICES


@pytest.mark.parametrize("path", PAGES)
def test_page_is_up_to_date(path: str) -> None:
    """`make docs` would change nothing."""
    assert (ROOT / path).read_text(encoding="utf-8") == PAGES[path](ROOT), "run `make docs`"


@pytest.mark.parametrize("service", SERVICES)
def test_variables_are_those_of_the_service(service: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The variables of a service's table are the ones that its --help offers."""
    with pytest.raises(SystemExit):
        load_config(SERVICES[service], program=service, argv=["--help"], environ={})
    offered = set(re.findall(r"\[(ASCENDRA_\w+)\]", capsys.readouterr().out))
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    [section] = [part for part in page.split("\n## ") if part.startswith(service.capitalize())]
    assert offered
    assert set(re.findall(r"^\| `[\w-]+` \| `(ASCENDRA_\w+)`", section, re.MULTILINE)) == offered
