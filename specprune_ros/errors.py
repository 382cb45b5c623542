"""Errors that a user or operator can act on.

Every error carries a `code`, a short stable word: `/diagnostics` counts by it.
"""

from __future__ import annotations

REPR_LIMIT = 120  # characters of a bad value that a message shows


def shown(value: object) -> str:
    """`repr(value)`, cut to a length that fits a log line."""
    text = repr(value)
    return text if len(text) <= REPR_LIMIT else text[: REPR_LIMIT - 3] + '...'


def named(error: BaseException) -> str:
    """Its kind and message: what others raised often says little without its kind."""
    return f'{type(error).__name__}: {error}'


class SpecPruneError(Exception):
    """Base of all errors that this package raises on purpose."""

    code = 'error'

    def __reduce__(self):
        """As it is: another process cannot make it anew from the message alone."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[SpecPruneError], args: tuple, fields: dict) -> SpecPruneError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(fields)
    return error


class ConfigError(SpecPruneError):
    """A parameter is unknown, of the wrong type, out of range, or does not fit another one."""

    code = 'config'

    def __init__(self, field: str, value: object, why: str):
        super().__init__(f'{field} = {shown(value)}: {why}')
        self.field = field


class ObservationError(SpecPruneError):
    """One observation cannot be used; the next one may be good.

    Args:
        code: what went wrong, one word per kind of fault, counted in `/diagnostics`.
        field: the input at fault, e.g. `cameras/wrist`.
        value: what was received.
        why: what was expected, or what to do.
    """

    def __init__(self, code: str, field: str, value: object, why: str):
        super().__init__(f'{field} = {shown(value)}: {why}')
        self.code = code
        self.field = field


class RecordingError(SpecPruneError):
    """A recording cannot be read, or lacks what a replay needs."""

    code = 'recording'

    def __init__(self, path: object, why: str):
        super().__init__(f'recording {str(path)!r}: {why}')


class CheckpointError(SpecPruneError):
    """Model files are missing, broken, or do not fit the configuration."""

    code = 'checkpoint'


class PruningError(SpecPruneError):
    """A pruning method failed or asked for something impossible; the step is computed dense."""

    code = 'pruning'


class ActionError(SpecPruneError):
    """The model produced an action that must not leave the policy."""

    code = 'action'


class MissingDependencyError(SpecPruneError):
    """A Python package is not installed.

    Args:
        package: import name.
        needed_for: what cannot be done without it.
        command: the exact command that installs it.
        error: why the import failed.
    """

    code = 'dependency'

    def __init__(self, package: str, needed_for: str, command: str, error: ImportError):
        absent = isinstance(error, ModuleNotFoundError) and error.name == package
        problem = 'is not installed' if absent else f'cannot be imported ({error})'
        super().__init__(f'{package} {problem}, {needed_for} needs it: {command}')
