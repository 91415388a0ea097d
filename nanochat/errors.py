"""UserError, the exception for mistakes that the user can correct."""

from typing import Literal

BadRows = Literal["error", "skip"]
"""Rows of a user's files that cannot be used raise UserError, or are left out and counted."""


class UserError(ValueError):
    """Error for bad input or a bad setting. Its message names the value, the limit and the remedy.

    Scripts print it as one line and exit with status 1; everything else is a bug and keeps its
    traceback.
    """
