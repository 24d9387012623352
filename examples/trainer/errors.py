"""Errors that a program of the examples reports in one line."""


class UsageError(Exception):
    """Reports a mistake that the user can correct, in one line."""


class DataError(UsageError):
    """Reports data that cannot be read, in one line that names the file."""
