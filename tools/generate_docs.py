"""Write docs/settings.md and the JSON Schema from the one schema; with --check, say whether they are up to date."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qingtune import cli  # noqa: E402
from qingtune.config.flags import default_of, extra_of, value_of  # noqa: E402
from qingtune.config.no_effect import NO_EFFECT  # noqa: E402
from qingtune.config.training import ALIASES, Settings, TrainConfig  # noqa: E402

# The scripts that the guide names.
SCRIPTS = {"train": " (fine_tune_qwen.py)", "chat": " (inference_lora.py)"}


def headings() -> dict[str, type[Settings]]:
    """Commands and what they take; those that take the same share a heading."""
    sharing: dict[type[Settings], list[str]] = {}
    for name, command in cli.COMMANDS.items():
        sharing.setdefault(command.settings, []).append(f"qingtune {name}{SCRIPTS.get(name, '')}")
    return {", ".join(names): schema for schema, names in sharing.items()}


def settings_page() -> str:
    """Every command's settings as Markdown tables."""
    lines = [
        "# Settings",
        "",
        "Made from `qingtune/config/training.py` and `qingtune/config/commands.py` by `make docs`; do not edit.",
        "Each name is a key of the JSON file and a flag (`--name value`); a flag overrides the file.",
        "Keys that start with `_` are comments. `docs/train_config.schema.json` is the schema for editors:",
        "name it as `$schema` in a file.",
    ]
    for command, schema in headings().items():
        lines += ["", f"## {command}"]
        heading = ""
        shared = TrainConfig.model_fields if issubclass(schema, TrainConfig) and schema is not TrainConfig else {}
        lines += ["", "All settings of `qingtune train`, and these:"] * bool(shared)
        for name, field in schema.model_fields.items():
            if name in shared:
                continue
            if extra_of(field, "group") != heading:
                heading = extra_of(field, "group")
                lines += ["", f"### {heading}", "", "| setting | value | default | meaning |", "|---|---|---|---|"]
            default = "required" if field.is_required() else default_of(field).strip("[]") or "-"
            value = value_of(field).replace("|", "\\|")
            flag = extra_of(field, "flag")
            also = f" (`--{flag}`)" if flag else ""
            lines.append(
                f"| `{name}`{also} | {value} | {default} | {(field.description or '').replace('|', chr(92) + '|')} |"
            )
    lines += ["", "## Older names", ""]
    lines += [f"- `{older}` is `{newer}`" for older, newer in ALIASES.items()]
    lines += ["", "## Accepted without effect", "", "TrainingArguments that cannot change a result here:", ""]
    for reason in dict.fromkeys(NO_EFFECT.values()):
        names = ", ".join(f"`{name}`" for name, why in NO_EFFECT.items() if why == reason)
        lines.append(f"- {names}: {reason}")
    return "\n".join(lines) + "\n"


def json_schema() -> str:
    """The JSON Schema of a training configuration; comments and older names are allowed."""
    schema = TrainConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["patternProperties"] = {"^[_$]": {}}
    for older, newer in ALIASES.items():
        schema["properties"][older] = schema["properties"][newer]
    for name in NO_EFFECT:
        schema["properties"].setdefault(name, {"description": f"No effect here: {NO_EFFECT[name]}."})
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Write the files, or compare them."""
    pages = {"docs/settings.md": settings_page(), "docs/train_config.schema.json": json_schema()}
    stale = [
        name
        for name, text in pages.items()
        if not (ROOT / name).exists() or (ROOT / name).read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv:
        for name in stale:
            print(f"{name} is not up to date; run `make docs`", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        (ROOT / name).write_text(pages[name], encoding="utf-8")
        print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
