"""The result file of a live bench: written after every run, so that a bench that was stopped goes on where it was."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.result_files import commit_id, write_result

RunKey = tuple[str, int, float]
"""(system, seed, requests per second)."""


class ResultFile:
    """Results of runs under the same settings; without a path they are only kept in memory."""

    def __init__(self, path: Path | None, settings: Mapping[str, str]) -> None:
        """Read what there is.

        Raises:
            ValueError: the file holds runs under other settings, or no runs.
        """
        self._path = path
        self._settings = dict(settings)
        self.results: list[dict[str, Any]] = []
        if path is None or not path.exists():
            return
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            given, self.results = dict(document["settings"]), list(document["results"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no result file of this bench: {error!r}") from error
        # What an older file does not name is a flag that there was not.
        there = {name: given.get(name, str(False)) for name in self._settings}
        changed = {name: (there[name], value) for name, value in self._settings.items() if there[name] != value}
        if changed:
            raise ValueError(f"{path} holds runs under other settings (there, here): {changed}")

    def holds(self, key: RunKey) -> bool:
        """Tell whether a run is in the file already."""
        return any((one["system"], one["seed"], one["rate_rps"]) == key for one in self.results)

    def append(self, result: dict[str, Any]) -> None:
        """Add a run; the file is replaced at once, so that it is whole at any time."""
        self.results.append({**result, "commit": commit_id()})
        write_result(self._path, {"commit": commit_id(), "settings": self._settings, "results": self.results})
