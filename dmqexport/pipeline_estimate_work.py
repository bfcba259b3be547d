"""What stages are made of, in counts: samples, values searched, products. The estimate's lower half."""

from collections.abc import Callable
from dataclasses import dataclass

from dmqexport.models.footprint import Footprint, LayerCost
from dmqexport.pipeline_size import TORCH_SHARE, ValidationSize, batch_within
from dmqexport.pipeline_speed import CENTERED, COARSE, FINE, LONG, MachineSpeed
from dmqexport.quant_types import MAX_BITS
from dmqexport.recipe import Recipe

FLOAT = 4
PROCESS = 700e6  # an interpreter with torch, diffusers and ONNX Runtime loaded
WHOLE_TRAJECTORIES = 64  # dmqexport/pipeline_calibrate.py
QUICK, SHORT, QUICK_COLUMNS, FITTED_COLUMNS = 33, 512, 2048, 4096  # calib/range_search.py
_SIMULATED = 12  # times that a layer's input goes through memory while it is quantized


@dataclass(frozen=True)
class StageEstimate:
    """One stage: wall seconds, of them in the float model; peak of resident memory; bytes it leaves on disk."""

    name: str
    seconds: float
    forward_seconds: float
    memory: int
    disk: int


@dataclass(frozen=True)
class Plan:
    """What the recipe asks of the model: denoising steps, guidance halves, working memory, whether weights are drawn,
    bytes of the other components of the pipeline, and multiply-accumulates of a picture's features (0: no metric)."""

    steps: int
    halves: int
    working: int
    random: bool
    companions: int = 0
    feature_macs: int = 0

    @property
    def calls(self) -> int:
        """Of the denoiser, a picture."""
        return self.steps * self.halves


class Work:
    """The stages found so far, and what one unit of each kind of work takes."""

    def __init__(self, recipe: Recipe, cost: Footprint, speed: MachineSpeed, plan: Plan, size: ValidationSize) -> None:
        self.recipe, self.cost, self.speed, self.plan, self.size = recipe, cost, speed, plan, size
        self.batch = batch_within(recipe.calibration.batch_size, cost, plan.working)
        self.weights = FLOAT * cost.parameters
        trajectories = recipe.calibration.size
        self.sampled = trajectories * plan.calls
        self.entries = kept_calls(trajectories, plan.calls, WHOLE_TRAJECTORIES)
        self.resident: float = PROCESS + self.weights + plan.companions
        self.activations = self.batch * TORCH_SHARE * cost.live_bytes
        self.stages: list[StageEstimate] = []

    def add(self, name: str, seconds: float, forwards: float, memory: float, disk: float = 0) -> None:
        """A stage. seconds: beside those of `forwards` samples in the float model."""
        own = forwards * self.forward
        self.stages.append(StageEstimate(name, seconds + own, own, round(memory), round(disk)))

    @property
    def rows(self) -> int:
        """Rows of the timestep table."""
        calibration = self.recipe.calibration
        if calibration.row_assignment == "per-step":
            return self.plan.steps
        return calibration.rows if self.recipe.drawn else min(calibration.rows, self.plan.steps)

    @property
    def forward(self) -> float:
        """Seconds of the float model for one sample, in a batch."""
        moved = 3 * FLOAT * self.cost.input_values / self.speed.copied
        return self.cost.macs / self.speed.macs + moved + self.cost.calls * self.speed.call / self.batch

    @property
    def quantizing(self) -> float:
        """Seconds that simulation adds to the float model's for one sample."""
        return _SIMULATED * FLOAT * self.cost.input_values / self.speed.copied

    def over_layers(self, work: Callable[[LayerCost], float]) -> float:
        """Sum over the layers."""
        return sum(work(layer) for layer in self.cost.layers)

    def sampled_values(self, layer: LayerCost) -> float:
        """Values that are kept of what a layer reads, a row."""
        return min(self.recipe.calibration.samples_per_row, layer.inputs * self.entries / self.rows)

    def activation_search(self, bits: int | None) -> float:
        """Seconds of searching every activation's ranges, row by row."""
        if bits is None or self.recipe.quantization.range == "minmax":
            return 0.0

        def searched(layer: LayerCost) -> float:
            values = self.sampled_values(layer)
            return COARSE * min(values, LONG) + (FINE + (CENTERED if bits == MAX_BITS else 0)) * values

        return self.rows * self.over_layers(searched) / self.speed.candidates

    def weight_search(self, bits: int, fitted: bool = False) -> float:
        """Seconds of searching every output channel's range; fitted: for second-order rounding."""
        if self.recipe.quantization.range == "minmax":
            return 2 * self.cost.weights / self.speed.candidates

        def candidates(layer: LayerCost) -> float:
            if fitted and layer.width > SHORT:
                seen = min(1.0, FITTED_COLUMNS / layer.width)
                if bits == MAX_BITS:
                    return CENTERED * seen
                return QUICK * min(1.0, QUICK_COLUMNS / layer.width) + FINE * seen
            return CENTERED if bits == MAX_BITS else COARSE * min(1.0, LONG / layer.width) + FINE

        return self.over_layers(lambda layer: layer.parameters * candidates(layer)) / self.speed.candidates

    def coding(self) -> float:
        """Seconds of turning every weight into its code and writing it."""
        return 40 * FLOAT * self.cost.weights / self.speed.copied + self.cost.weights / self.speed.written


def kept_calls(trajectories: int, calls: int, whole: int) -> int:
    """Calls that are kept of so many trajectories: all, or every n-th of more than `whole`."""
    return trajectories * -(-calls // max(1, trajectories // whole))
