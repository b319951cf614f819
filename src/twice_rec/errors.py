"""How a stage ends early: an input that cannot be used, work that stays open, or only a check."""

from __future__ import annotations


class InputError(Exception):
    """Something the user gave cannot be used. The message says what, where, and what to do about it."""


class CheckedError(Exception):
    """Not an error: the end of a run that was asked to look at its inputs only (`--check`)."""


class Unfinished(Exception):
    """The work could not be done to its end, through no fault of the input. The message says what is open."""
