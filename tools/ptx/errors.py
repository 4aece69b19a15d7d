"""What the executor raises: `Unsupported` for PTX it does not know, `Fault` for a kernel that misbehaves."""

from __future__ import annotations


class Unsupported(Exception):
    """The PTX uses something the executor does not model. It never guesses."""


class Fault(Exception):
    """A kernel did something a correct kernel never does.

    Attributes: `kind` (one of KINDS), `instruction` (its text), `line` (source file:line), `cta` and `thread`
    (xyz tuples of the first offender, or None where no single thread is to blame).
    """

    KINDS = (
        "out-of-bounds",  # outside every registered buffer, or outside shared/local/const/param memory
        "misaligned",  # address is no multiple of the access size
        "unwritten",  # read of shared memory, or of a buffer marked so, before anything wrote it
        "read-only",  # store into a buffer the caller marked read-only, or into constant memory
        "race",  # conflicting accesses with no barrier (or fence and atomic) in between
        "barrier",  # threads of one block wait at different barriers, or left without reaching one
        "collective",  # a warp instruction whose named lanes do not all take part
        "async",  # data of a cp.async used before its wait
        "launch",  # a launch the driver would refuse: arguments, block size, shared memory
        "steps",  # ran past the step limit
        "trap",  # trap, a failed device assertion
    )

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        instruction: str = "",
        line: str = "?",
        cta: tuple[int, ...] | None = None,
        thread: tuple[int, ...] | None = None,
    ):
        assert kind in self.KINDS, kind
        self.kind, self.instruction, self.line, self.cta, self.thread = kind, instruction, line, cta, thread
        where = f" (block {cta}, thread {thread})" if cta is not None else ""
        at = f"{line}: {instruction}: " if instruction else ""
        super().__init__(f"{at}{kind}: {message}{where}")
