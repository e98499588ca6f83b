"""The one kind of error that a person can mend."""


class UserError(ValueError):
    """Bad input or a state that the user can change: one line, `<what>: <rule>; <what to do>`."""
