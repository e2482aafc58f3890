"""Every error and warning of the library, on one page.

ResidualMemoryError
├── InvalidInput (ValueError)        an argument that cannot be used: what was found, what was expected
│   ├── DimensionMismatch            keys or predictions of another width than the memory's
│   ├── DuplicateId                  an id given twice, or already held
│   ├── UnknownId                    an id that the memory does not hold
│   ├── FingerprintMismatch          another model, layer or preprocessing than the memory was built with
│   └── PathNotShared                a worker on another machine does not see a file or directory
├── MissingExtra (ImportError)       an optional package is not installed; the message says which
├── BrokenPlugin (ImportError)       an engine of another package cannot be used; the message says which, and why
├── MemoryNotFound (FileNotFoundError)
├── DataNotFound (FileNotFoundError)
├── CorruptFile                      bytes on disk are not those that were written
├── UnsupportedFormat                written by a newer version of the library
├── MemoryLocked                     another process is writing
├── ReadOnlyMemory                   a change was asked of a read-only handle
├── WorkerLost                       processes of a cluster died over the same work again and again
├── ShardDown                        a part of a distributed index does not answer now
├── ServerFailure                    a server does not answer, refuses, or fails
└── StorageFailure (OSError)         the disk refused: full, read-only, broken; the memory is as it was

ResidualMemoryWarning (UserWarning)
├── FewerNeighbors                   more neighbours were asked for than there are rows
├── HeldRows                         rows that are said to be held out are in the memory
├── InSampleResiduals                the base knows its training data too well for residuals to mean much
├── LowRecall                        an index cannot reach the recall that was asked for
├── PartialAnswer                    parts of a distributed index did not answer, and their rows are missing
└── UncalibratedScores               probabilities were made of scores that are none
"""


class ResidualMemoryError(Exception):
    """Root of all errors that the library raises on purpose."""


def cause_and_remedy(error: Exception) -> tuple[str, str]:
    """The two parts of a message: what was found and expected, and what to do; empty where it does not say."""
    separator = ": pip install " if isinstance(error, MissingExtra) else "; "
    cause, found, remedy = str(error).partition(separator)
    return cause, f"pip install {remedy}" if found and isinstance(error, MissingExtra) else remedy


class InvalidInput(ResidualMemoryError, ValueError):
    """An argument that cannot be used; state is as it was."""


class DimensionMismatch(InvalidInput):
    """Keys or predictions have another width than the memory's."""


class DuplicateId(InvalidInput):
    """An id was given twice, or the memory already holds it."""


class UnknownId(InvalidInput):
    """An id that the memory does not hold."""


class FingerprintMismatch(InvalidInput):
    """The memory was built with another model, layer or preprocessing."""


class PathNotShared(InvalidInput):
    """A worker on another machine does not see a file or directory."""


class MissingExtra(ResidualMemoryError, ImportError):
    """An optional package is needed; the message says how to install it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an extra: pip install 'residual-memory[{extra}]'")


class BrokenPlugin(ResidualMemoryError, ImportError):
    """An engine of another package cannot be imported, or is none."""


class MemoryNotFound(ResidualMemoryError, FileNotFoundError):
    """There is no memory at the path."""

    def __str__(self) -> str:
        return str(self.args[0])


class DataNotFound(ResidualMemoryError, FileNotFoundError):
    """A data set is not on this machine and cannot be fetched."""

    def __str__(self) -> str:
        return str(self.args[0])


class CorruptFile(ResidualMemoryError):
    """Bytes on disk are not those that were written."""


class UnsupportedFormat(ResidualMemoryError):
    """The file was written by a newer version of the library."""


class MemoryLocked(ResidualMemoryError):
    """Another process is writing to the memory."""


class ReadOnlyMemory(ResidualMemoryError):
    """A change was asked of a read-only or closed handle."""


class WorkerLost(ResidualMemoryError):
    """Processes of a cluster died over the same work again and again."""


class ShardDown(ResidualMemoryError):
    """A part of a distributed index does not answer now; the message says which, why, and what to do."""


class ServerFailure(ResidualMemoryError):
    """A server does not answer, refuses, or fails."""


class StorageFailure(ResidualMemoryError, OSError):
    """The disk refused; the memory is as it was before the call."""


class ResidualMemoryWarning(UserWarning):
    """Root of all warnings of the library."""


class FewerNeighbors(ResidualMemoryWarning):
    """More neighbours were asked for than the memory has rows."""


class HeldRows(ResidualMemoryWarning):
    """Rows that are said to be held out are in the memory, so figures on them say something else."""


class LowRecall(ResidualMemoryWarning):
    """However hard an approximate index looks, it finds fewer of the neighbours than was asked for."""


class InSampleResiduals(ResidualMemoryWarning):
    """The base fits its training data far better than other data, so in-sample residuals say little."""


class PartialAnswer(ResidualMemoryWarning):
    """Parts of a distributed index did not answer; the answer is of the rows of the others."""


class UncalibratedScores(ResidualMemoryWarning):
    """An estimator gives no probabilities, so they were made of its scores."""
