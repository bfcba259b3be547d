"""What goes to standard error besides progress."""

import logging
import sys


class Session:
    """What `main` must know about the running command when it fails."""

    verbose = False
    resumable = False
    rank = 0  # of the processes that run this command together


class _CurrentStderr(logging.Handler):
    """Writes to what standard error is now: progress bars replace it while they are shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        print(self.format(record), file=sys.stderr)


def start_logging(*, verbose: bool, quiet: bool = False) -> None:
    """What libraries log stays quiet unless asked for; what we warn of is shown."""
    Session.verbose = verbose
    handler = _CurrentStderr()
    handler.setFormatter(
        logging.Formatter("%(levelname)s %(name)s: %(message)s" if verbose else "warning: %(message)s")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if verbose else logging.ERROR)
    ours = logging.INFO if verbose else logging.ERROR if quiet or Session.rank else logging.WARNING
    for package in ("dmqexport", "calib", "passes", "engines"):
        logging.getLogger(package).setLevel(ours)
    for library in ("onnx_ir", "onnxscript", "torch", "diffusers", "transformers"):
        logging.getLogger(library).setLevel(logging.WARNING if verbose else logging.ERROR)
