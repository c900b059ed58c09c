"""`estimate completion SHELL`: a script by which a shell completes commands, models, options and their choices."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from typing import TYPE_CHECKING

from estimator.describe.checks import choose
from estimator.describe.plan import Plan
from estimator.describe.presets import presets
from estimator.describe.settings import settings
from estimator.hardware.accelerators import accelerators
from estimator.show import commands

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SHELLS = ("bash", "zsh", "fish")
OTHERS = ("app", "calibrate", "check", "completion")  # whose options are few, or need PyTorch to be asked for
ENTRY = re.compile(r"\s{1,4}-")  # a line of a help that an option begins
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")

BASH = """\
# estimate's completion: eval "$(estimate completion bash)"
_estimate() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} words=""
    case "$prev" in
{values}
        *)
            if [[ $COMP_CWORD -eq 1 ]]; then
                words="{first}"
            else
                case "${{COMP_WORDS[1]}}" in
{options}
                esac
            fi ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    if [[ ${{#COMPREPLY[@]}} -eq 0 ]]; then COMPREPLY=($(compgen -f -- "$cur")); fi
}}
complete -F _estimate estimate
"""


def run(argv: Sequence[str]) -> int:
    """`estimate completion`: print the script of a shell.

    Raises:
        ConfigError: another shell.
    """
    parser = commands.Parser(
        prog="estimate completion",
        description='Print what makes a shell complete this command; bash and zsh: eval "$(estimate completion bash)", '
        "fish: estimate completion fish | source.",
    )
    parser.add_argument("shell", help=", ".join(SHELLS))
    shell = choose("shell", parser.parse_args(argv).shell, SHELLS)
    sys.stdout.write(script(shell))
    return 0


def script(shell: str) -> str:
    """The script of a shell."""
    first = [*(command.name for command in commands.COMMANDS), *presets()]
    if shell == "fish":
        return _fish(first)
    values = "\n".join(f'        {flag}) words="{" ".join(names)}" ;;' for flag, names in choices().items())
    options = "\n".join(
        f'                    {name}) words="{" ".join(found)}" ;;' for name, found in options_by_command().items()
    )
    text = BASH.format(values=values, first=" ".join(first), options=options)
    return text if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{text}"


def _fish(first: Sequence[str]) -> str:
    lines = ["# estimate's completion: estimate completion fish | source"]
    lines.append(f"complete -c estimate -n __fish_use_subcommand -a '{' '.join(first)}'")
    known = choices()
    options = options_by_command()
    for option in options["*"]:
        takes = f" -x -a '{' '.join(known[option])}'" if option in known else ""
        lines.append(f"complete -c estimate -l {option[2:]}{takes}")
    for name, found in options.items():
        if name != "*":
            lines += [
                f"complete -c estimate -n '__fish_seen_subcommand_from {name}' -l {option[2:]}" for option in found
            ]
    return "\n".join(lines) + "\n"


def choices() -> Mapping[str, Sequence[str]]:
    """What may follow an option, by the option."""
    found: dict[str, Sequence[str]] = {"--gpu": tuple(accelerators())}
    for setting in settings(Plan).values():
        if setting.choices:
            found[f"--{setting.name.replace('_', '-')}"] = tuple(setting.choices)
    return found


def options_by_command() -> Mapping[str, Sequence[str]]:
    """The options of each sub-command, as its help has them; "*" is a model's."""
    named = {c.name: c for c in commands.COMMANDS if c.name not in OTHERS and c is not commands.COMMANDS[0]}
    found = {name: _options([name, "--help"]) for name in named}
    return found | {"*": _options([commands.COMMANDS[0].name, "--help", "all"])}


def _options(argv: Sequence[str]) -> Sequence[str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        commands.main(argv)
    begun = (line.strip().split("  ")[0] for line in out.getvalue().splitlines() if ENTRY.match(line))
    return tuple(dict.fromkeys(option for entry in begun for option in OPTION.findall(entry)))
