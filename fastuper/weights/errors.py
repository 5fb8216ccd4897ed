"""CheckpointError, which everything that reads or writes weights raises."""


class CheckpointError(OSError):
    """Weights cannot be read or written; the message names the file, the reason and the remedy."""
