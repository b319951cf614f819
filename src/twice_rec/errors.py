"""How a stage ends early: an input that cannot be used, work that stays open, or only a check."""

from __future__ import annotations

from twice_rec.masking import masked


class _Told(Exception):
    """An error whose message is shown to the user, and so holds no secret."""

    def __init__(self, message: str = ""):
        super().__init__(masked(message))


class InputError(_Told):
    """Something the user gave cannot be used. The message says what, where, and what to do about it."""


class CheckedError(Exception):
    """Not an error: the end of a run that was asked to look at its inputs only (`--check`)."""


class Unfinished(_Told):
    """The work could not be done to its end, through no fault of the input. The message says what is open."""
