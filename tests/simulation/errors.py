"""What a simulated run may come to, besides its end."""

from __future__ import annotations


class Stuck(BaseException):
    """Virtual time is up, or nothing will ever happen again."""


class Violation(BaseException):
    """Something that must never happen has happened."""
