"""The judgement of a build whose statistics were drawn: that its graph is one, and nothing about its answers."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from dmqexport.pipeline import Build
from dmqexport.pipeline_validate import Validation
from dmqexport.workspace import StageRecord
from engines.compare import check_graph

_VERSION = 1


class Unjudged(Validation):
    """What `Validation` offers, without running any graph: every figure is None."""

    @property
    def judges_retrieval(self) -> bool:
        """No."""
        return False

    @property
    def judges_frechet(self) -> bool:
        """No."""
        return False

    @cached_property
    def measured(self) -> StageRecord:
        """`metrics.json`; the ONNX checker has read the graph. Raises EngineError for one that it refuses."""
        build = self.build

        def run(folder: Path) -> None:
            check_graph(build.deployed_graph)
            nothing = {"sqnr_db": None, "by_row": [None] * build.plan.rows}
            figures = ("eps_sqnr_db", "image_psnr_db", "image_ssim")
            document = {**dict.fromkeys(figures), "layers": {layer.name: nothing for layer in build.plan.layers}}
            (folder / "metrics.json").write_text(json.dumps(document), encoding="utf-8")

        return build.workspace.stage("check", {"version": _VERSION, "passes": build.passed.fingerprint}, run)

    @property
    def latency(self) -> dict[str, Any] | None:
        """None: how fast such a graph is says nothing about a measured one."""
        return None


def validation_of(build: Build) -> Validation:
    """How `build` is judged."""
    return Unjudged(build) if build.recipe.drawn else Validation(build)
