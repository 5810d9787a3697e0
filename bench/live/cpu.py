"""Who spends the machine's time during a run: a live result says little once the machine itself is the limit."""

import time
from typing import Any

import psutil

_SERVICES = {"services.router": "routers", "services.predictor": "predictor", "services.worker.fleet": "workers"}


class CpuWatch:
    """Measures from its making on; processes that ended in between are left out."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._spent = _spent()
        self._machine = psutil.cpu_times()

    def cores(self) -> dict[str, Any]:
        """Return the cores that each kind of process kept busy, and the busy share of the whole machine."""
        elapsed_s = max(time.monotonic() - self._began_s, 1e-6)
        now, machine = _spent(), psutil.cpu_times()
        cores = {
            name: round((now[name] - before) / elapsed_s, 3) for name, before in self._spent.items() if name in now
        }
        total = sum(machine) - sum(self._machine)
        idle = machine.idle - self._machine.idle
        return {"cores": cores, "machine_busy": round(1 - idle / max(total, 1e-6), 3)}


def _spent() -> dict[str, float]:
    """Return CPU seconds by kind of process: this client, and its children with all of theirs."""
    me = psutil.Process()
    spent = {"client": _cpu_s(me)}
    for child in me.children():
        try:
            words = child.cmdline()
            kind = next((name for module, name in _SERVICES.items() if module in words), "other")
            family_s = sum(map(_cpu_s, [child, *child.children(recursive=True)]))
        except psutil.NoSuchProcess:
            continue
        spent[kind] = spent.get(kind, 0.0) + family_s
    return spent


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)
