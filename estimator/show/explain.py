"""estimate explain: an out-of-memory message, or a memory summary, beside the estimate of its run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from estimator.describe.checks import ConfigError
from estimator.show.cli import asked, carrying, parser
from estimator.show.formatting import size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from estimator.answers.explanation import Explanation, Moment

SHOWN = 6  # changes
MANY = 2**20  # characters: more is no message


def run(argv: Sequence[str]) -> int:
    """`estimate explain MODEL ... [--message FILE]`.

    Raises:
        ConfigError: what is asked cannot be, or the text is no message of PyTorch's.
    """
    from estimator.answers.explanation import explain  # noqa: PLC0415 - sympy, which --help does without
    from estimator.answers.messages import read_message  # noqa: PLC0415 - likewise

    arguments = parser()
    arguments.prog = "estimate explain"
    arguments.description = (
        "What torch.OutOfMemoryError's message or torch.cuda.memory_summary() says, beside the estimate of the run."
    )
    arguments.add_argument(
        "--message", metavar="FILE", help="a file with the message among its lines (default: standard input)"
    )
    args = arguments.parse_args(argv)
    message = read_message(_text(args.message))
    r = asked(args)
    found = explain(message, r, args.global_batch_size, **carrying(args))
    sys.stdout.write("\n".join(lines(found)) + "\n")
    return 0


def _text(file: str | None) -> str:
    if file is not None:
        try:
            return Path(file).read_text(encoding="utf-8", errors="replace")[-MANY:]
        except OSError as error:
            raise ConfigError(f"message = {file!r}: cannot be read ({error.strerror})") from None
    if sys.stdin is None or sys.stdin.closed:
        raise ConfigError("message = None: paste it on standard input, or name a file")
    if sys.stdin.isatty():
        sys.stderr.write("Paste the message, then press Ctrl-D.\n")
    return sys.stdin.read()[-MANY:]


def lines(e: Explanation) -> Iterator[str]:
    """The answer, line by line."""
    m, memory = e.message, e.estimate.memory
    said: list[tuple[str, int | None]] = [
        ("tried to allocate", m.tried),
        ("allocated by PyTorch" if m.kind == "message" else "allocated at the peak", m.allocated),
        ("reserved and not allocated", m.unallocated),
        ("outside of PyTorch's allocator", m.beside),
        ("other processes", m.others),
        ("the device has", m.capacity),
    ]
    yield "The message says" if m.kind == "message" else "The summary says"
    yield from (f"  {name:34}{size(nbytes):>12}" for name, nbytes in said if nbytes is not None)
    yield ""
    yield "The estimate says"
    if e.expected is not None:
        yield f"  the first allocation that does not fit is {_placed(e.expected)}"
    if e.moment is not None and e.moment != e.expected:
        yield f"  most like what failed is {_placed(e.moment)}"
    yield f"  at its peak, in the {memory.where.phase} of {memory.where.module or 'the model'}"
    yield from (f"  {name:34}{size(nbytes):>12}" for name, nbytes in _largest(memory.parts))
    yield f"  {'allocated, with rounding':34}{size(memory.allocated):>12}"
    yield f"  {'context and NCCL':34}{size(memory.needed - memory.allocated):>12}"
    yield f"  {'needed':34}{size(memory.needed):>12}"
    yield ""
    yield "Where they differ"
    yield from (f"  {text}" for text in differences(e))
    yield ""
    yield "Single changes that would fit, the best first" if e.fits else "No single change of the recipe would fit."
    yield from _changes(e)


def _placed(moment: Moment) -> str:
    where, step = moment.where, "first" if moment.first else "second"
    place = f"{where.phase} of {where.module or 'the model'} ({where.op or 'forward'}), {step} step"
    return f"the {size(moment.nbytes)} in {place}, with {size(moment.before)} alive"


def _largest(parts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(((name, n) for name, n in parts.items() if n), key=lambda entry: -entry[1])


def differences(e: Explanation) -> Iterator[str]:
    """What one of the two has and the other has not, in whole sentences."""
    from estimator.answers.explanation import LIKE  # noqa: PLC0415 - sympy, which --help does without

    m, memory = e.message, e.estimate.memory
    allocated = m.allocated or 0
    if abs(e.more) <= LIKE * allocated:
        yield "In what is allocated they agree."
    elif e.more > 0:
        yield (
            f"{size(e.more)} more are allocated than the estimate knows: another setting than was given here, a second "
            "model, or tensors that the loop keeps (losses, outputs, a graph that was not let go)."
        )
    elif m.kind == "summary" or e.moment is not None:
        yield f"{size(-e.more)} less are allocated than the estimate has alive: a setting given here is not the run's."
    if m.kind == "message" and e.moment is None:
        yield "No allocation of the estimate's step asks the device for what was tried: the settings may differ."
    if m.kind == "message" and memory.capacity is not None and memory.fits and e.more <= LIKE * allocated:
        yield "By the estimate the step fits, so that what failed is beside it: see the lines below."
    if e.fragmented:
        yield (
            f"{size(m.unallocated or 0)} were reserved and free, more than was tried for, in pieces: "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True lets the allocator join them."
        )
    least, most = (own + shared for own, shared in zip(memory.context, memory.nccl, strict=True))
    if m.beside is not None and not least <= m.beside <= most:
        word = "more" if m.beside > most else "less"
        yield f"Outside of the allocator are {size(m.beside)}, {word} than the {size(least)} to {size(most)} expected."
    if m.others:
        yield f"Other processes hold {size(m.others)} of the device: end them first."
    if m.capacity is not None and memory.capacity is not None and abs(m.capacity - memory.capacity) > LIKE * m.capacity:
        yield f"The device has {size(m.capacity)}, the accelerator that was given {size(memory.capacity)}."


def _changes(e: Explanation) -> Iterator[str]:
    from estimator.show.remedies import options_of  # noqa: PLC0415 - sympy, which --help does without

    for change in e.fits[:SHOWN]:
        then = change.estimate.memory.needed + max(e.more, 0)
        ratio = change.seconds or change.work
        what = "time" if change.seconds is not None else "work"
        yield f"  {options_of(change):44} needs {size(then)} of {size(e.capacity)}, {what} {ratio - 1:+.0%}"
    if any(change.alters for change in e.fits[:SHOWN]):
        yield "  * also changes what is learned."
    if not e.fits:
        yield "  `estimate` with the same options tries up to four at once, and larger machines."
