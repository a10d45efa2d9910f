"""What ends a run or a command with one message; no torch, so that every command can name them at once."""


class CompileError(RuntimeError):
    """A unit's inputs vary more than is compiled for."""


class CheckpointError(ValueError):
    """A checkpoint that does not exist, is not complete, or is not of this run; the message says what to do."""


class ConfigError(ValueError):
    """A user's mistake in a config file, an override or a resumed run; the message says what to do."""


class RunError(RuntimeError):
    """The run cannot go on; raised on all ranks alike. The message says why and what to do."""


class BadDataError(RunError):
    """More samples were unreadable than data.max_bad_share allows, or nearly all of the last ones."""


class DivergedError(RunError):
    """Steps are skipped one after another, or the validation is not finite: more training helps no more."""


class PeerError(RunError):
    """Another rank failed or was lost; the message names it."""


class DeviceMemoryError(RunError):
    """This rank's GPU has run out of memory; the others do not know of it."""
