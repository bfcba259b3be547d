"""One tree of errors. Each says what went wrong, where, got versus expected, and how to mend it.

Every class carries the exit code the command line ends with, so that scripts can tell the cases apart:
0 ok, 1 internal, 2 usage or recipe, 3 accuracy gate, 4 performance gate, 5 resource limit,
6 bundle integrity or compatibility, 7 backend missing.
"""

from typing import ClassVar


class DmqExportError(Exception):
    """Root of every error a user can meet; a traceback is never shown for it."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """Say what is wrong in `message` and, in `hint`, how to mend it."""
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


class RecipeError(DmqExportError):
    """A recipe, option or argument that cannot be used."""

    exit_code = 2


class ModelError(DmqExportError):
    """A model that cannot be found, read, or handled."""

    exit_code = 2


class CalibrationError(DmqExportError):
    """Calibration that produced, or would produce, meaningless statistics."""


class BindingError(DmqExportError):
    """Torch modules and ONNX nodes that do not match one to one."""


class LoweringError(DmqExportError):
    """A graph that a pass or a target refuses; the reason is in the message."""


class EngineError(DmqExportError):
    """An engine that failed to build, to run, or to prove its precision."""


class GateError(DmqExportError):
    """The result is worse than the recipe's accuracy thresholds."""

    exit_code = 3


class PerformanceGateError(DmqExportError):
    """The result is slower than the recipe requires."""

    exit_code = 4


class ResourceError(DmqExportError):
    """Disk, memory or permission limits of this machine."""

    exit_code = 5


class RankError(DmqExportError):
    """Another process of the same build failed or was killed, most often for want of memory."""

    exit_code = 5

    def __init__(self, message: str, *, hint: str | None = None, rank: int | None = None) -> None:
        """rank: the one that failed, None when that is not known or it has told the user itself."""
        super().__init__(message, hint=hint)
        self.rank = rank


class BundleError(DmqExportError):
    """A bundle that is truncated, tampered with, or does not fit this machine."""

    exit_code = 6


class BackendMissingError(DmqExportError):
    """A runtime or device that this machine lacks."""

    exit_code = 7
