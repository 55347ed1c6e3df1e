"""`contentv COMMAND --help`, generated from the configuration dataclasses."""

from __future__ import annotations

from contentv.config.compose import groups, keys
from contentv.config.schema import ROOTS


def help_text(command: str, summary: str) -> str:
    """Returns the command's choices and keys with defaults, units and ranges."""
    lines = [f"contentv {command}: {summary}", "", f"usage: contentv {command} key=value ...", ""]
    choices = groups(command)
    if choices:
        lines.append("choices:")
        lines += [f"  {group}={'|'.join(names)}" for group, names in choices.items()]
        lines.append("")
    lines.append("keys (default): meaning")
    for key, field, default in keys(ROOTS[command]):
        shown = '""' if default == "" else str(default)
        lines.append(f"  {key} ({shown}): {field.metadata.get('help', '')}".rstrip(": "))
    lines += ["", f"contentv {command} --cfg key=value ... prints the resolved configuration and stops."]
    if command == "curate":
        lines.append("contentv curate --scorers lists what clips are scored by.")
    return "\n".join(lines) + "\n"
