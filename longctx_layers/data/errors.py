"""Errors about data, which the programs report in one line."""


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file or option, and the remedy."""


class ResumptionError(ValueError):
    """A run cannot be resumed from its checkpoint in the way that was asked for."""
