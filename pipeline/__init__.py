"""Raw ImageNet to shards (offline), shards to batches on the device (online)."""

# Begins the few lines of text that git leaves instead of a large file where git-lfs is not installed
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the value, the limit and the remedy.

    Commands print the message and exit with `exit_code`, without a traceback.
    """

    exit_code = 2


class SourceError(UserError):
    """RAW holds nothing that we know, contradicts itself, or is not what it was."""
