"""The one error of this package that a user can mend: its message names the cause and the way out, in one line."""


class HFViTError(ValueError):
    """Bad input. Command lines print it as `error: ...` and exit with status 2; libraries let it through."""
