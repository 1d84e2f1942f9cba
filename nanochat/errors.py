"""Errors meant for a person: what is wrong, what to do; and the one place that turns them into exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable

USER_ERROR_CODE = 2
INTERRUPTED_CODE = 75  # work saved, run the same command again (EX_TEMPFAIL)


class UserError(Exception):
    """Something the person at the keyboard can put right: `problem` is what was found, `hint` what to do."""

    def __init__(self, problem: str, hint: str) -> None:
        super().__init__(problem, hint)
        self.problem, self.hint = problem, hint

    def __str__(self) -> str:
        return f"{self.problem}\n  {self.hint}"


class Interrupted(Exception):
    """A signal asked the run to stop and its state has been saved."""


def run(main: Callable[[list[str] | None], object], argv: list[str] | None = None) -> int:
    """Call `main(argv)`; its exit code: 0, 2 (a UserError: two lines on stderr), 75 (stopped, saved), 130."""
    try:
        main(argv)
    except UserError as error:
        print(f"error: {error.problem}\n  hint: {error.hint}", file=sys.stderr)
        return USER_ERROR_CODE
    except Interrupted as error:
        print(f"stopped: {error}", file=sys.stderr)
        return INTERRUPTED_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    return 0
