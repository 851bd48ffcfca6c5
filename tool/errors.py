"""The two ways in which a program ends on purpose."""


class DataError(Exception):
    """A file, image or map cannot be used: one sentence with the path or id and what to do."""


class UsageError(Exception):
    """A command line that cannot be carried out: one sentence that names the flag."""
