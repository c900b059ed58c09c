"""estimate: one command with sub-commands, of which each is one entry of `COMMANDS`.

A sub-command is a function of its arguments that writes to stdout, returns the exit status and lets ConfigError
through: what all of them share (bad input, closed pipes, full disks, a package that is not installed) is here.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import estimator
from estimator.describe.checks import SHOWN, ConfigError, shown
from estimator.show.output import guarded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from _typeshed import SupportsWrite


@dataclass(frozen=True, slots=True)
class Command:
    """One sub-command.

    Attributes:
        name: the word after `estimate`.
        summary: what it is for, in one line without a full stop.
        function: "package.module:function", imported when it is called; it takes the words after the name.
    """

    name: str
    summary: str
    function: str


COMMANDS = (
    Command(
        "estimate", "memory, time and cost of training a model; what `estimate MODEL` means", "estimator.show.cli:run"
    ),
    Command("plan", "from money, a deadline, tokens or a size: what to train, on what", "estimator.show.planning:run"),
    Command("budget", "the same as plan", "estimator.show.planning:run"),
    Command("layouts", "the ways to lay a run out on so many accelerators, by time", "estimator.show.layouts:run"),
    Command("course", "the course's question on GPT-2 XL, worked in three columns", "estimator.show.course:run"),
    Command(
        "check",
        "whether a step of your own code fits, by running it without data",
        "trainer.referee.recorder.check:run",
    ),
    Command("explain", "an out-of-memory message or memory summary, beside the estimate", "estimator.show.explain:run"),
    Command("calibrate", "measure this machine, or the factor of your own log", "estimator.show.cli:calibrate"),
    Command("app", "the page, in a browser", "estimator.show.app:run"),
    Command("completion", "what makes a shell complete these commands", "estimator.show.completion:run"),
    Command("list", "the names of all models, families, accelerators and networks", "estimator.show.listing:run"),
)

EXAMPLES = """\
examples:
  estimate gpt2-xl --gpu a100-80gb-sxm --batch-size 4 --attention sdpa
  estimate llama-3.1-8b --gpu h100-80gb-sxm --count 8 --sharding fsdp --precision bf16-mixed
  estimate path/to/config.json --json
  estimate layouts llama-3.1-8b --gpu h100-80gb-sxm --count 64 --global-batch-size 256
  estimate plan --budget 5000
  estimate check train.py:build --gpu h100-80gb-sxm --precision bf16-mixed
  estimate plan --parameters 1.3e9 --tokens 26e9 --max-days 3
"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that repeats no more of a long word than an error of the library does."""

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print the help; argparse's own is silent where it cannot be written."""
        (file or sys.stdout).write(self.format_help())

    def error(self, message: str) -> NoReturn:
        """Print usage and `message`, and exit with 2."""
        said = re.sub(rf"\S{{{SHOWN + 1},}}", lambda word: f"{word[0][: SHOWN - 3]}...", message)
        # A word that is no text (bytes that are no UTF-8) is shown as its bytes.
        super().error(said.encode("utf-8", "backslashreplace").decode())


class TopicHelp(argparse.Action):
    """`--help` prints the options that most people need; `--help TOPIC` a group of them, `--help all` every one.

    Args:
        common: what the short help says of each option in it.
        topics: the group of options behind each topic.
    """

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str = argparse.SUPPRESS,
        *,
        common: Mapping[str, str],
        topics: Mapping[str, Any],
    ) -> None:
        said = f"this help, or that of a topic: {', '.join((*topics, 'all'))}"
        super().__init__(option_strings, dest, nargs="?", default=argparse.SUPPRESS, metavar="TOPIC", help=said)
        self.common, self.topics = common, topics

    def __call__(
        self, parser: argparse.ArgumentParser, _namespace: object, values: object, option_string: str | None = None
    ) -> NoReturn:
        """Print the help and exit."""
        if values not in (None, "all", *self.topics):
            allowed = ", ".join((*self.topics, "all"))
            parser.error(f"argument {option_string}: {shown(values)} is no topic; topics are {allowed}")
        if values == "all":
            parser.print_help()
        elif values is None:
            rows = {**self.common, "--help TOPIC": f"more: {', '.join((*self.topics, 'all'))}"}
            width = max(map(len, rows))
            sys.stdout.write(parser.format_usage() + "\n" + f"{parser.description}\n\n")
            sys.stdout.writelines(f"  {option:{width}}  {said}\n" for option, said in rows.items())
        else:
            formatter = parser._get_formatter()  # noqa: SLF001 - argparse has no other way to format one group
            formatter.start_section(self.topics[str(values)].title)
            formatter.add_arguments(self.topics[str(values)]._group_actions)  # noqa: SLF001 - likewise
            formatter.end_section()
            sys.stdout.write(formatter.format_help())
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 if all is well, 2 for bad input, 1 where the output cannot be written."""
    return guarded("estimate", lambda: _dispatched(sys.argv[1:] if argv is None else list(argv)))


def _dispatched(argv: list[str]) -> int:
    first = argv[0] if argv else ""
    if not argv or first in ("-h", "--help"):
        (sys.stdout if argv else sys.stderr).write(overview())
        return 0 if argv else 2
    if first == "--version":
        sys.stdout.write(f"transformer-estimator {estimator.__version__}\n")
        return 0
    if first == "--list":
        argv = ["list", *argv[1:]]
    named = next((command for command in COMMANDS if argv[0] == command.name), None)
    command, rest = (named, argv[1:]) if named else (COMMANDS[0], argv)
    called = f"estimate {command.name}" if command is not COMMANDS[0] else "estimate"
    try:
        return _function(command)(rest)
    except ConfigError as error:
        sys.stderr.write(f"{called}: error: {error}\n")
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in EXTRAS:
            raise
        extra = EXTRAS[error.name.split(".")[0]]
        sys.stderr.write(f"{called}: error: {error.name} is missing: pip install 'transformer-estimator[{extra}]'\n")
        return 2


# What the core does without, and the extra that brings it.
EXTRAS = {"torch": "trainer", "tokenizers": "trainer", "safetensors": "trainer", "tyro": "trainer", "streamlit": "app"}


def _function(command: Command) -> Callable[[list[str]], int]:
    module, _, name = command.function.partition(":")
    function: Callable[[list[str]], int] = getattr(importlib.import_module(module), name)
    return function


def overview() -> str:
    """The help of `estimate` itself: its sub-commands, one line each, and examples."""
    width = max(len(command.name) for command in COMMANDS)
    rows = "".join(f"  {command.name:{width}}  {command.summary}\n" for command in COMMANDS)
    return (
        "usage: estimate [COMMAND] ...\n\n"
        "What training a Transformer takes: bytes, FLOPs, hours, dollars and kilowatt-hours.\n\n"
        f"commands (`estimate COMMAND --help` says more):\n{rows}\n"
        f"{EXAMPLES}"
    )
