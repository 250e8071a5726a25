"""The one kind of error that a learner is meant to read."""

from __future__ import annotations


class CourseError(Exception):
    """An error whose message is a clear sentence for the learner: what is wrong and what to do.

    IPython calls `_render_traceback_` to show an exception, so a notebook shows the sentence alone, without a
    traceback; the command line prints it as `error: ...` and leaves with `exit_code`.
    """

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]
