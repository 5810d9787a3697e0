"""Service configuration: flag > environment (ASCENDRA_*) > YAML file > default; unknown keys are refused.

A service declares one frozen dataclass whose fields are made with `option`. Field `metrics_listen` is the flag
`--metrics-listen`, the variable `ASCENDRA_METRICS_LISTEN` and the YAML key `metrics-listen`. A field whose type is a
dataclass of such fields is a block: `tls: {cert: FILE}` in YAML is `--tls-cert` and `ASCENDRA_TLS_CERT` too. Mappings
and other dataclasses can only be set in YAML.
"""

import argparse
import dataclasses
import enum
import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

ENV_PREFIX = "ASCENDRA_"
_T = TypeVar("_T")


class ConfigError(Exception):
    """The configuration is wrong; the message names the key and what is allowed."""


def option(default: Any, help: str) -> Any:
    """Declare a configuration field with its default and a help text that states the unit."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def load_config(
    config_type: type[_T], *, program: str, argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None
) -> _T:
    """Build the effective configuration of a service; print it and exit when asked to.

    Raises SystemExit with a message on stderr when the configuration is wrong.
    """
    parser = _parser(config_type, program)
    arguments = parser.parse_args(argv)
    try:
        config = resolve(
            config_type,
            file=Path(arguments.config) if arguments.config else None,
            environ=os.environ if environ is None else environ,
            flags={k: v for k, v in vars(arguments).items() if v is not None and k not in ("config", "print_config")},
        )
    except ConfigError as error:
        parser.error(str(error))
    if arguments.print_config:
        sys.stdout.write(dump_config(config))
        raise SystemExit(0)
    return config


def resolve(
    config_type: type[_T],
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> _T:
    """Merge the sources into one configuration. Raises ConfigError."""
    hints = typing.get_type_hints(config_type)
    fields = {field.name: field for field in dataclasses.fields(cast("Any", config_type))}
    values: dict[str, Any] = {}
    blocks: dict[str, dict[str, Any]] = {}
    for key, value in _read_yaml(file).items():
        name = str(key).replace("-", "_")  # YAML has numbers, dates and so on as keys, too
        if name not in fields:
            raise ConfigError(f"{file}: unknown key {key!r}; known keys: {', '.join(_key(n) for n in fields)}")
        if _is_block(hints[name]):
            blocks[name] = _fields_from_yaml(value, hints[name], f"{file}: {key}")
        else:
            values[name] = _from_yaml(value, hints[name], f"{file}: {key}")
    for setting in settings(config_type):
        for source, where in ((environ, setting.variable), (flags, setting.flag)):
            name = setting.variable if source is environ else setting.name
            if source and name in source:
                target = values if len(setting.path) == 1 else blocks.setdefault(setting.path[0], {})
                target[setting.path[-1]] = _from_text(source[name], setting.hint, where)
    try:
        for name, changes in blocks.items():
            values[name] = dataclasses.replace(_default_of(fields[name]), **changes)
        return config_type(**values)
    except ValueError as error:  # a dataclass may check its fields in __post_init__
        raise ConfigError(str(error)) from error


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """What a flag or a variable can set: a scalar field, or one of a block."""

    path: tuple[str, ...]
    """Name of the field, or of the block and its field."""
    hint: Any
    field: "dataclasses.Field[Any]"

    @property
    def name(self) -> str:
        """The name with underscores."""
        return "_".join(self.path)

    @property
    def flag(self) -> str:
        """The flag."""
        return f"--{_key(self.name)}"

    @property
    def variable(self) -> str:
        """The environment variable."""
        return ENV_PREFIX + self.name.upper()


def settings(config_type: type[Any]) -> Iterator[Setting]:
    """Yield everything that flags and variables can set, in the order of the fields."""
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        hint = hints[field.name]
        if _is_scalar(hint):
            yield Setting((field.name,), hint, field)
        elif _is_block(hint):
            for inner in settings(hint):
                yield Setting((field.name, *inner.path), inner.hint, inner.field)


def dump_config(config: object) -> str:
    """Render a configuration as YAML that `--config` accepts."""
    return yaml.safe_dump(_to_yaml(config), sort_keys=False, allow_unicode=True)


def _parser(config_type: type[Any], program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description=(config_type.__doc__ or "").strip(),
        epilog="Precedence: flag > environment > --config file > default.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the keys below")
    parser.add_argument("--print-config", action="store_true", help="print the effective configuration and exit")
    for setting in settings(config_type):
        default = _default_of(setting.field)
        shown = "" if default in (None, "", ()) else f" (default: {_show(default)})"
        help_text = f"{setting.field.metadata.get('help', '')}{shown} [{setting.variable}]"
        parser.add_argument(
            setting.flag, dest=setting.name, metavar=_metavar(setting.hint), help=help_text.replace("%", "%%")
        )
    return parser


def _read_yaml(file: Path | None) -> dict[Any, Any]:
    if file is None:
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8: {error.reason} at byte {error.start}") from error
    except (yaml.YAMLError, ValueError) as error:  # a date that there is not is a ValueError
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a mapping of keys")
    return content


def _key(name: str) -> str:
    return name.replace("_", "-")


def _default_of(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _show(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _metavar(hint: Any) -> str:
    hint = _strip_optional(hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "{" + ",".join(str(member.value) for member in hint) + "}"
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if typing.get_origin(hint) is tuple:
        return "A,B,..."
    return {int: "N", float: "X", bool: "true|false"}.get(hint, "TEXT")


def _strip_optional(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [argument for argument in typing.get_args(hint) if argument is not type(None)]
        if len(inner) == 1:
            return inner[0]
    return hint


def _is_scalar(hint: Any) -> bool:
    hint = _strip_optional(hint)
    if typing.get_origin(hint) is typing.Literal or typing.get_origin(hint) is tuple:
        return True
    return isinstance(hint, type) and (hint in (str, int, float, bool) or issubclass(hint, enum.Enum))


def _is_block(hint: Any) -> bool:
    return (
        isinstance(hint, type)
        and dataclasses.is_dataclass(hint)
        and all("help" in field.metadata for field in dataclasses.fields(hint))
    )


def _from_text(text: str, hint: Any, where: str) -> Any:
    hint = _strip_optional(hint)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return tuple(_from_text(part.strip(), item, where) for part in text.split(",") if part.strip())
    if hint is bool:
        lowered = text.strip().lower()
        if lowered in ("true", "1", "yes", "on"):
            return True
        if lowered in ("false", "0", "no", "off"):
            return False
        raise ConfigError(f"{where}: expected true or false, got {text!r}")
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError as error:
            raise ConfigError(f"{where}: expected a number, got {text!r}") from error
    return _choice(text, hint, where)


def _choice(value: Any, hint: Any, where: str) -> Any:
    if typing.get_origin(hint) is typing.Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{where}: expected one of {', '.join(map(str, typing.get_args(hint)))}, got {value!r}")
        return value
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(value)
        except ValueError as error:
            allowed = ", ".join(str(member.value) for member in hint)
            raise ConfigError(f"{where}: expected one of {allowed}, got {value!r}") from error
    return value


def _from_yaml(value: Any, hint: Any, where: str) -> Any:
    if value is None and type(None) in typing.get_args(hint):
        return None
    hint = _strip_optional(hint)
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _dataclass_from_yaml(value, cast("type[Any]", hint), where)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}")
        item = typing.get_args(hint)[1]
        return {str(k): _from_yaml(v, item, f"{where}.{k}") for k, v in value.items()}
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        item = typing.get_args(hint)[0]
        return origin(_from_yaml(v, item, f"{where}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool):
        if type(value) is not hint:
            raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
        return value
    return _choice(value, hint, where)


def _dataclass_from_yaml(value: Any, hint: type[Any], where: str) -> Any:
    try:
        return hint(**_fields_from_yaml(value, hint, where))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _fields_from_yaml(value: Any, hint: type[Any], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a mapping, got {value!r}")
    hints = typing.get_type_hints(hint)
    names = {field.name for field in dataclasses.fields(hint)}
    values = {}
    for key, item in value.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise ConfigError(f"{where}: unknown key {key!r}; known keys: {', '.join(map(_key, sorted(names)))}")
        values[name] = _from_yaml(item, hints[name], f"{where}.{key}")
    return values


def _to_yaml(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {_key(f.name): _to_yaml(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): _to_yaml(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_to_yaml(item) for item in value]
    return value
