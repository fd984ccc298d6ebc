"""Commands and flags of the first version, refused with their new name. No torch."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["COMMANDS", "FLAGS", "renamed_word"]

COMMANDS = {
    "ask": "generate",
    "apply": "generate --delta FILE --compare-base",
    "show": "inspect",
    "check": "verify",
    "fold": "fuse",
}
"""Old command to new one. `data check` is in `renamed_word`."""

FLAGS = {
    "generate": {"--tokens": "--max-new-tokens"},
    "run": {"--fresh": "--overwrite", "--out": "--output"},
    "edit": {"--out": "--output"},
    "merge": {"--out": "--output"},
    "remove": {"--out": "--output"},
    "export": {"--out": "--output"},
    "import": {"--out": "--output", "--form": "--arithmetic"},
    "fuse": {"--out": "--output", "--no-check": "--skip-check"},
    "train": {
        "--out": "--output",
        "--folder": "--checkpoint-dir",
        "--set": "--training-set",
        "--cases": "--num-known",
        "--new-cases": "--num-new",
    },
}
"""Command to its old flags and the new ones."""


def renamed_word(words: Sequence[str]) -> str:
    """Find a command or flag of the first version.

    Args:
        words: The arguments after `errata`.

    Returns:
        A sentence with the new name. Empty if there is none.

    Example:
        >>> renamed_word(["show", "a.safetensors"])
        "unknown command 'show'; it is now called 'inspect'."
    """
    words = [word for word in words if word != "--debug"]
    command = words[0] if words else ""
    if command in COMMANDS:
        return f"unknown command {command!r}; it is now called {COMMANDS[command]!r}."
    if list(words[:2]) == ["data", "check"]:
        return "unknown command 'data check'; it is now called 'data verify'."
    flags = FLAGS.get(command, {})
    for word in words[1:]:
        flag = word.partition("=")[0]
        if flag in flags:
            return f"unknown option {flag!r} of {command}; it is now called {flags[flag]!r}."
    return ""
