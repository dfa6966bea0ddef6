"""What a user can do wrong, as one exception with three parts: the field, the value, the mend.

Everything a user can cause (a misspelt key, missing data, a tampered checkpoint) is a `UserError`. The command line
prints it as one message and exits with code 2. Any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """A mistake the user can mend. `str()` is the whole message; it has no traceback on the command line."""

    def __init__(self, problem: str, *, field: str | None = None, value: object = None, mend: str | None = None):
        self.problem = problem
        self.field = field
        self.value = value
        self.mend = mend
        super().__init__(problem, field, value, mend)

    def __str__(self) -> str:
        where = "" if self.field is None else f"{self.field}"
        if self.field is not None and self.value is not None:
            where += f" = {self.value!r}" if not isinstance(self.value, Path) else f" = {str(self.value)!r}"
        head = f"{where}: {self.problem}" if where else self.problem
        return head if self.mend is None else f"{head} ({self.mend})"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.problem, self.field, self.value, self.mend)


def _rebuild(kind: type[UserError], problem: str, field: str | None, value: object, mend: str | None) -> UserError:
    return kind(problem, field=field, value=value, mend=mend)


class CorruptData(UserError):
    """A shard, checkpoint or model file whose bytes are not those that its manifest promises."""


class NoRoom(UserError):
    """A disk is full or a quota used up: waiting may help."""


class RunInterrupted(Exception):
    """What a run stood on is gone, such as its cluster; the same command goes on once there is another.

    `str()` is the whole message; the command line prints it without a traceback and exits with code 1.
    """
