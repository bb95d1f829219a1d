"""The one exception that users see: its message is a single line naming the value, the limit and the fix."""


class QsunError(ValueError):
    """Bad input or an impossible request. The command line prints it as one line and exits with 2."""


class ResumeError(QsunError):
    """An interrupted run cannot be continued with these settings."""
