"""Configuration: precedence, refusal of what is unknown or wrong, and a dump that loads again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from services.common.config import ConfigError, dump_config, load_config, option, resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """A nested mapping."""

    ttft_ms: float = 2000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Example service."""

    listen: str = option("127.0.0.1:0", "address")
    budget_tokens: int = option(512, "tokens per step")
    margin: float = option(0.1, "share")
    tickets: bool = option(True, "issue tickets")
    workers: tuple[str, ...] = option((), "addresses")
    order: Literal["fcfs", "llf"] = option("llf", "order")
    classes: dict[str, Limits] = option({}, "SLO classes")


def write(tmp_path: Path, text: str) -> Path:
    """Write a YAML file."""
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return file


def test_precedence_is_flag_environment_file_default(tmp_path: Path) -> None:
    """Each source overrides the next."""
    file = write(tmp_path, "budget-tokens: 1\nmargin: 1\nlisten: file:1\n")
    config = resolve(
        Sample,
        file=file,
        environ={"ASCENDRA_BUDGET_TOKENS": "2", "ASCENDRA_MARGIN": "2"},
        flags={"budget_tokens": "3"},
    )
    assert (config.budget_tokens, config.margin, config.listen, config.order) == (3, 2.0, "file:1", "llf")


def test_lists_and_booleans_are_read_from_text() -> None:
    """A flag or variable holds comma-separated lists and true/false."""
    config = resolve(Sample, environ={"ASCENDRA_WORKERS": "a:1, b:2", "ASCENDRA_TICKETS": "no"})
    assert config.workers == ("a:1", "b:2")
    assert config.tickets is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budget: 3", "unknown key 'budget'"),
        ("budget-tokens: many", "expected int"),
        ("budget-tokens: true", "expected int"),
        ("order: lifo", "expected one of fcfs, llf"),
        ("workers: a:1", "expected a list"),
        ("classes: {fast: {ttft: 3}}", "unknown key 'ttft'"),
        ("[1, 2]", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("listen: 2026-13-01", "not valid YAML"),
        ("1: x", "unknown key 1"),
        ("true: x", "unknown key True"),
        ("? [listen]\n: x", "unknown key|not valid YAML"),
        (b"listen: caf\xe9\n", "not UTF-8"),
        (b"\xff\xfe\x00\x01", "not UTF-8"),
        (b"listen: \x00", "not valid YAML"),
    ],
)
def test_wrong_files_are_refused_with_the_key(
    tmp_path: Path, text: str | bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names the file, what is wrong and what is allowed, in one line."""
    file = tmp_path / "config.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")) as caught:
        resolve(Sample, file=file)
    assert str(file) in str(caught.value)
    with pytest.raises(SystemExit):
        load_config(Sample, program="sample", argv=["--config", str(file)], environ={})
    assert capsys.readouterr().err.splitlines()[-1] == f"sample: error: {caught.value}"


@pytest.mark.parametrize(
    "environ", [{"ASCENDRA_BUDGET_TOKENS": "x"}, {"ASCENDRA_TICKETS": "maybe"}, {"ASCENDRA_ORDER": "lifo"}]
)
def test_wrong_variables_are_refused(environ: dict[str, str]) -> None:
    """The message names the variable."""
    with pytest.raises(ConfigError, match=next(iter(environ))):
        resolve(Sample, environ=environ)


def test_the_dump_loads_again(tmp_path: Path) -> None:
    """--print-config prints a file that gives the same configuration."""
    config = resolve(Sample, file=write(tmp_path, "classes: {fast: {ttft-ms: 5}}\nworkers: [a]\norder: fcfs\n"))
    assert config.classes["fast"] == Limits(ttft_ms=5.0)
    assert resolve(Sample, file=write(tmp_path, dump_config(config))) == config


def test_help_tells_default_unit_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    """--help is the reference of the flags."""
    with pytest.raises(SystemExit):
        load_config(Sample, program="sample", argv=["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "tokens per step (default: 512) [ASCENDRA_BUDGET_TOKENS]" in text
    assert "--classes" not in text


def test_print_config_and_errors_exit(capsys: pytest.CaptureFixture[str]) -> None:
    """--print-config exits 0; a wrong value exits 2 with one line that names the flag."""
    with pytest.raises(SystemExit) as printed:
        load_config(Sample, program="sample", argv=["--print-config"], environ={})
    assert printed.value.code == 0
    assert "budget-tokens: 512" in capsys.readouterr().out
    with pytest.raises(SystemExit) as wrong:
        load_config(Sample, program="sample", argv=["--budget-tokens", "x"], environ={})
    assert wrong.value.code == 2
    assert "--budget-tokens: expected a number" in capsys.readouterr().err


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """A block."""

    cert: str = option("", "certificate")
    names: tuple[str, ...] = option((), "names")

    def __post_init__(self) -> None:
        if self.names and not self.cert:
            raise ValueError("names needs cert")


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked:
    """Example service with a block."""

    tls: Files = option(Files(), "files")


def test_a_block_can_be_set_from_every_source(tmp_path: Path) -> None:
    """Each part of a block has a flag and a variable; parts from several sources are checked together."""
    file = write(tmp_path, "tls: {names: [a, b]}\n")
    assert resolve(Blocked, file=file, environ={"ASCENDRA_TLS_CERT": "x"}).tls == Files(cert="x", names=("a", "b"))
    config = resolve(Blocked, environ={"ASCENDRA_TLS_CERT": "x"}, flags={"tls_cert": "y", "tls_names": "c"})
    assert config.tls == Files(cert="y", names=("c",))
    assert resolve(Blocked, file=write(tmp_path, dump_config(config))) == config
    assert load_config(Blocked, program="t", argv=["--tls-cert", "z"], environ={}).tls.cert == "z"
    for wrong in ("tls: {names: [a]}\n", "tls: {other: 1}\n", "tls: 1\n"):
        with pytest.raises(ConfigError, match=r"cert|mapping"):
            resolve(Blocked, file=write(tmp_path, wrong))
