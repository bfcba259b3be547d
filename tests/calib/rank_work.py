"""What test_distributed.py starts several times at once: `python rank_work.py WORK FOLDER [WEIGHTS COHERENCE]`."""

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from calib.distributed import joined
from dmqexport.errors import CalibrationError, DmqExportError
from dmqexport.ranks import Ranks


def blocks(ranks: Ranks, folder: Path, weights: Any) -> None:
    """Three ranks and batches of four: now and then a rank has no entry in a batch."""
    from block_models import small
    from safetensors.torch import save_file
    from test_block_distill import planned, trained

    from calib.trainable import TrainOptions

    subject = planned(small(30), folder / f"plan-{ranks.rank}", 8)
    options = TrainOptions(weights=weights)
    changed = {"iterations": 3, "batch_size": 4, "held_out": 6, "max_ram": 2**16}
    result, state = trained(subject, folder / "scratch", options, **changed, ranks=ranks)
    (folder / f"blocks-{ranks.rank}.json").write_text(json.dumps([asdict(block) for block in result.blocks]))
    save_file({key: value.contiguous() for key, value in state.items()}, folder / f"state-{ranks.rank}.safetensors")


def network(ranks: Ranks, folder: Path, coherence: float) -> None:
    """Two guided calls a batch, so that of three ranks one has none."""
    import torch
    from block_models import small
    from safetensors.torch import save_file
    from test_block_distill import planned
    from torch import Tensor

    from calib.network_distill import distill_network, teacher_outputs
    from calib.sampling import CalibrationSet
    from calib.trainable import TrainOptions, trainable

    subject = planned(small(30), folder / f"plan-{ranks.rank}", 8)
    number = torch.arange(24)
    inputs = subject.denoiser.data.select(number)
    data = CalibrationSet(inputs, number // 8, (number // 2) % 4)
    targets = teacher_outputs(data, subject.denoiser.run, 8)

    def run(named: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = subject.denoiser.model(**named, return_dict=False)[0]
        return output

    denoiser = subject.denoiser.model
    with trainable(denoiser, subject.plan, subject.weights, subject.found, TrainOptions()) as model:
        result = distill_network(
            model, data, targets, run, names=None, guidance=3.0, guided_share=0.5, step_weights=torch.ones(4),
            coherence=coherence, guidance_length=1.0, iterations=3, batch_size=4, seed=0, ranks=ranks,
        )  # fmt: skip
        state = model.state()
    (folder / f"losses-{ranks.rank}.json").write_text(json.dumps(result.losses))
    save_file({key: value.contiguous() for key, value in state.items()}, folder / f"network-{ranks.rank}.safetensors")


def stop(ranks: Ranks, how: str) -> None:
    """Meet, exchange, and then one of two ranks stops as `how` says."""
    ranks.meet("the start")
    assert ranks.tell("a word", f"from {ranks.rank}") == "from 0"
    assert ranks.total(np.arange(3.0) + ranks.rank).tolist() == [1.0, 3.0, 5.0]
    if ranks.rank == (0 if how == "first is killed" else 1):
        if how == "raises":
            raise CalibrationError("the tensor is all NaN")
        if how.endswith("killed"):
            time.sleep(0.2)
            os.kill(os.getpid(), 9)
        if how == "returns":
            return
    if how == "while others sum, is killed":
        ranks.total(np.zeros(3))
    ranks.meet("the end")


def main() -> None:
    work, folder, *rest = sys.argv[1:]
    try:
        with joined() as ranks:
            if work == "train":
                blocks(ranks, Path(folder), rest[0])
                network(ranks, Path(folder), float(rest[1]))
            else:
                stop(ranks, work)
    except DmqExportError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
