"""Write the pages that come from the code: ``python docs/generate.py`` makes cli.md and models.md anew."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from beavervision.cli import app
from beavervision.errors import BeaverVisionError
from beavervision.models.cards import CARDS, ModelCard, data_hashes
from beavervision.settings import Settings

_MADE = "<!-- Made by docs/generate.py from the code: do not edit. -->\n"


def pages() -> dict[str, str]:
    """The content of each page, by its file name."""
    return {"cli.md": cli_page(), "models.md": models_page()}


def cli_page() -> str:
    """Every command with its options, and the exit codes."""
    root = typer.main.get_command(app)
    parts = [
        _MADE,
        "# Commands\n",
        "Results go to standard output, progress and errors to standard error. With `--json` a command prints one JSON\n"
        'document and nothing else, for an error `{"error": {"code": ..., "message": ...}}`.\n',
        "Videos, pictures and sound are read from files, not from pipes or devices. A file that is written appears whole, in\n"
        "place of one of its name or of the one that a symbolic link leads to, but never of an input, a device or a pipe.\n",
        *_command("beavervision", root),
        "## Exit codes\n",
        "| exit code | error code | meaning |\n|---|---|---|",
        "| 0 | | done |",
        "| 1 | `error` | Something that has no class below; likely a defect. |",
        *(f"| {e.exit_code} | `{e.code}` | {(e.__doc__ or '').splitlines()[0]} |" for e in _below(BeaverVisionError)),
        "",
        "Besides, `doctor` ends with 5 where something does not work, and every command with 141 when nobody reads its "
        "output any more.\n",
        "## Settings\n",
        'As environment variables (`BEAVERVISION_DEVICE=cpu`) or in `~/.config/beavervision/config.toml` (`device = "cpu"`; '
        "`BEAVERVISION_CONFIG` names another file).\nThe environment comes first, options of the command line before both. "
        "Those of the service and of live sessions are in [service.md](service.md#settings) and [live.md](live.md#settings).\n",
        "| setting | default | |\n|---|---|---|",
        *(f"| `{name}` | {_default(value)} | {meaning} |" for name, value, meaning in _settings()),
        "",
    ]
    return "\n".join(parts)


def _settings() -> list[tuple[str, Any, str]]:
    """Of the general settings: name, default, and the comment beside it."""
    found = re.findall(r"^    (\w+): \w+ = .*?(?:  # (.*))?$", inspect.getsource(Settings), re.MULTILINE)
    defaults = {f.name: f.default for f in fields(Settings)}
    return [(name, defaults[name], said) for name, said in found if not name.startswith(("serve_", "live_"))]


def models_page() -> str:
    """Every model card."""
    parts = [
        _MADE,
        "# Models\n",
        "Bundled files are compared with their hash whenever they are loaded. `beavervision models --json` prints the same.\n",
    ]
    for card in CARDS:
        parts += [f"## {card.name}\n", f"{card.summary}\n", "| | |\n|---|---|", *_facts(card), ""]
    return "\n".join(parts)


def _below(kind: type[BeaverVisionError]) -> list[type[BeaverVisionError]]:
    children = [child for child in kind.__subclasses__() if child.__module__ == kind.__module__]
    return [error for child in children for error in (child, *_below(child))]


def _command(name: str, command: Any) -> list[str]:
    parts = [f"## {name}\n", f"{' '.join((command.help or '').split())}\n"]
    rows = [_row(param) for param in command.params if param.name != "help"]
    if rows:
        parts += ["| option | meaning | default |\n|---|---|---|", *rows, ""]
    for child, inner in getattr(command, "commands", {}).items():
        parts += _command(f"{name} {child}", inner)
    return parts


def _row(param: Any) -> str:
    if param.param_type_name == "argument":
        names = f"`{(param.metavar or param.name).upper()}`"
        meaning = getattr(param, "help", None) or ""
    else:
        names = ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))
        meaning = param.help or ""
    default = "required" if param.required else _default(param.default)
    return f"| {names} | {' '.join(meaning.split())} | {default} |"


def _default(value: Any) -> str:
    return "" if value is None or value is False or value == "" else f"`{'on' if value is True else value}`"


def _facts(card: ModelCard) -> list[str]:
    rows = {
        "kind": card.kind,
        "licence of the code": card.licence_code,
        "licence of the weights": card.licence_weights,
        "commercial use": "no; needs `--allow-non-commercial`" if card.non_commercial else "yes",
        "source": card.source,
        "sha256": f"`{card.sha256}`" if card.sha256 else "",
        "timing": ""
        if card.timing is None
        else f"steps of {card.timing.hop_ms:g} ms, hears {card.timing.left_context_ms:g} ms back and "
        f"{card.timing.look_ahead_ms:g} ms ahead",
        **{f"`{name}`": f"`{data_hashes()[name]}`" for name in card.files},
    }
    return [f"| {key} | {value} |" for key, value in rows.items() if value]


if __name__ == "__main__":
    for _name, _text in pages().items():
        Path(__file__).with_name(_name).write_text(_text, encoding="utf-8")
