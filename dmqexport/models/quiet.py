"""Keep the model libraries' notices and progress bars off the user's terminal."""

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Silence diffusers, transformers and huggingface_hub inside the block; their settings come back after it.

    What matters of their notices (missing weights, unknown classes) is checked by us and raised as an error.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers.utils.logging as diffusers_logging
        import transformers.utils.logging as transformers_logging

        hub: Any = importlib.import_module("huggingface_hub.utils")
        hub_logger = logging.getLogger("huggingface_hub")
        hub_level, hub_bars = hub_logger.level, not hub.are_progress_bars_disabled()
        saved = [
            (library, library.get_verbosity(), library.is_progress_bar_enabled())
            for library in (diffusers_logging, transformers_logging)
        ]
        try:
            hub_logger.setLevel(logging.ERROR)
            if hub_bars:
                hub.disable_progress_bars()
            for library, _, _ in saved:
                # CRITICAL, not ERROR: diffusers logs an error before it raises, and we report what it raises.
                library.set_verbosity(logging.CRITICAL)
                library.disable_progress_bar()
            yield
        finally:
            hub_logger.setLevel(hub_level)
            if hub_bars:
                hub.enable_progress_bars()
            for library, verbosity, bars in saved:
                library.set_verbosity(verbosity)
                if bars:
                    library.enable_progress_bar()
