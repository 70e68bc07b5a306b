"""Generate docs/configuration.md from the keys that pdserve/config.py defines.

python tools/make_config_docs.py            write it
python tools/make_config_docs.py --check    fail when the committed page is not what would be written
"""

import argparse
import sys
import types
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from pdserve.config import DeployConfig, section_of
from pdserve.config_values import parse_bytes

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

HEAD = """\
# Configuration

A deployment is one YAML file, all of whose keys may be left out: `pdserve up --config FILE`. Options of the
command line win over the file; `--set KEY=VALUE` sets any key, written with dots
(`--set engine.kv_memory=512MiB`). An unknown key or a value that is not allowed stops the start with one line
that names it. Ready files with comments are in [deploy](../deploy).

This page is generated from [`pdserve/config.py`](../pdserve/config.py) by `tools/make_config_docs.py`; do not
edit it.
"""

TABLE_HEAD = "| key | value | default | meaning |\n|---|---|---|---|"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    page = make_page()
    if not check:
        PAGE.write_text(page)
    elif not PAGE.exists() or PAGE.read_text() != page:
        print("docs/configuration.md is not what tools/make_config_docs.py writes: run it", file=sys.stderr)
        return 1
    return 0


def make_page() -> str:
    """The whole page as Markdown."""
    return "\n".join([HEAD, *_sections(DeployConfig, "", DeployConfig.__doc__)])


def _sections(section: type[BaseModel], path: str, text: str | None) -> Iterator[str]:
    """One part of the page per section of the file, the sections inside it after it."""
    inner = {name: field for name, field in section.model_fields.items() if section_of(section, name)}
    plain = {name: field for name, field in section.model_fields.items() if name not in inner}
    if plain:
        yield f"## {f'`{path}`' if path else 'Top level'}\n"
        yield _flow(text) + "\n"
        yield TABLE_HEAD
        yield from (_row(f"{path}.{name}".lstrip("."), field) for name, field in plain.items())
        yield ""
    for name, field in inner.items():
        kind = section_of(section, name)
        assert kind is not None
        is_list = get_origin(field.annotation) is tuple
        text = kind.__doc__ if is_list else field.description or kind.__doc__
        yield from _sections(kind, f"{path}.{name}".lstrip(".") + ("[]" if is_list else ""), text)


def _row(key: str, field: FieldInfo) -> str:
    default = "" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"
    cells = [f"`{key}`", _values(field), default, _flow(field.description)]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _values(field: FieldInfo) -> str:
    if any(isinstance(item, BeforeValidator) and item.func is parse_bytes for item in field.metadata):
        return "size"
    bounds = [bound for item in field.metadata if (bound := _bound(item))]
    return ", ".join([_kind(_annotation(field)), *bounds])


def _kind(annotation: Any) -> str:
    """What may be written, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = [bound for item in arguments[1:] for bound in _bounds(item)]
        return ", ".join([_kind(arguments[0]), *bounds])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {_kind(arguments[0])}" if Ellipsis in arguments else "`FIRST-LAST`"
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return " or ".join(f"`{value}`" for value in annotation)
    if origin is dict:
        return f"map to {_kind(arguments[1])}"
    names = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "`true` or `false`",
        type(None): "`null`",
    }
    return names[annotation]


def _bounds(item: Any) -> Iterator[str]:
    yield from (bound for part in getattr(item, "metadata", [item]) if (bound := _bound(part)))


def _bound(item: Any) -> str:
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return " ".join(f"{word} {getattr(item, sign)}" for sign, word in signs.items() if hasattr(item, sign))


def _yaml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _annotation(field: FieldInfo) -> Any:
    return field.annotation


def _flow(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    sys.exit(main())
