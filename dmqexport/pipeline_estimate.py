"""What a build will take, stage by stage: time, memory, disk. From counts of the model and the machine's own speed.

The formulas say how often each kind of work is done, as the stages do it; the speed of that work is measured on the
spot. Nothing here is a result of an earlier build.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dmqexport.models.footprint import Footprint, LayerCost
from dmqexport.pipeline_size import GRAPH_SHARE, TORCH_SHARE, ValidationSize, batch_within
from dmqexport.pipeline_speed import MachineSpeed
from dmqexport.recipe import Recipe
from dmqexport.target import Target

_FLOAT = 4
_PROCESS = 900e6  # an interpreter with torch, diffusers and ONNX Runtime loaded
_VECTORS, _JUDGED = 768, 2**19  # calib/channel_scaling.py
_PROPOSALS, _QUICK_CANDIDATES = 10, 33
_CANDIDATES, _LONG = 247, 4096  # calib/range_search.py
_BLOCK_WIDTH, _WIDE, _POSITIONS = 4608, 1152, 512  # calib/second_order.py
_SCALING_ENTRIES, _REFINE_ENTRIES, _WHOLE = 256, 2048, 64  # dmqexport/pipeline_calibrate.py
_READ = 1.5e9  # bytes a second of files that were just written; hashing is slower than reading
_PASSES_OBSERVED = 8  # times that an observed tensor goes through memory, beside the layer
_EXPORT_CALLS, _PASS_CALLS = 2500, 400  # operators' worth of Python for each operator that is exported, rewritten
_SESSION_CALLS = 400
_MODULE_CALLS = 100  # likewise, of making a module
_DRAWN_VALUES = 256  # calib/drawn.py


@dataclass(frozen=True)
class StageEstimate:
    """One stage: wall seconds, of them in the float model; peak of resident memory; bytes it leaves on disk."""

    name: str
    seconds: float
    forward_seconds: float
    memory: int
    disk: int


@dataclass(frozen=True)
class Estimate:
    """A whole build. result: bytes of the deployed denoiser; canonical: of its packed form in the work folder."""

    stages: tuple[StageEstimate, ...]
    result: int
    canonical: int

    @property
    def seconds(self) -> float:
        """In all."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def memory(self) -> int:
        """The largest peak."""
        return max(stage.memory for stage in self.stages)

    @property
    def disk(self) -> int:
        """Work folder and bundle together."""
        return sum(stage.disk for stage in self.stages)


@dataclass(frozen=True)
class Plan:
    """What the recipe asks of the model: denoising steps, guidance halves, working memory, whether weights are drawn,
    and bytes of the other components of the pipeline."""

    steps: int
    halves: int
    working: int
    random: bool
    companions: int = 0


def estimate(recipe: Recipe, cost: Footprint, speed: MachineSpeed, plan: Plan, size: ValidationSize) -> Estimate:
    """Estimate every stage of `dmqexport build` with `recipe`."""
    return _Estimator(recipe, cost, speed, plan, size).estimate()


class _Estimator:
    def __init__(self, recipe: Recipe, cost: Footprint, speed: MachineSpeed, plan: Plan, size: ValidationSize) -> None:
        self.recipe, self.cost, self.speed, self.plan, self.size = recipe, cost, speed, plan, size
        self.batch = batch_within(recipe.calibration.batch_size, cost, plan.working)
        self.weights = _FLOAT * cost.parameters
        trajectories = recipe.calibration.size
        self.sampled = trajectories * plan.steps * plan.halves
        self.entries = min(trajectories, _WHOLE) * plan.steps * plan.halves
        self.resident = _PROCESS + self.weights + plan.companions
        self.activations = self.batch * TORCH_SHARE * cost.live_bytes
        self.stages: list[StageEstimate] = []

    def estimate(self) -> Estimate:
        bits = self.recipe.widths
        packed = 0.5 if bits.weight <= 4 else 1.0
        whole = 1.0 if self.recipe.target in (Target.TRT, Target.TRT_RTX) else packed
        rest = _FLOAT * (self.cost.parameters - self.cost.weights) + 4000 * len(self.cost.layers)
        canonical, result = (round(share * self.cost.weights + rest) for share in (packed, whole))
        if self.recipe.drawn:
            self.drawn(canonical, result)
            return Estimate(tuple(self.stages), result, canonical)
        self.load()
        self.calibrate()
        self.quantize()
        if self.recipe.training.trains or self.recipe.quantization.refine_on == "training":
            self.train()
        self.graphs(canonical, result)
        self.judge(result)
        return Estimate(tuple(self.stages), result, canonical)

    # What stages are made of

    def add(self, name: str, seconds: float, forwards: float, memory: float, disk: float = 0) -> None:
        own = forwards * self.forward
        self.stages.append(StageEstimate(name, seconds + own, own, round(memory), round(disk)))

    @property
    def forward(self) -> float:
        """Seconds of the float model for one sample, in a batch."""
        moved = 3 * _FLOAT * self.cost.input_values / self.speed.copied
        return self.cost.macs / self.speed.macs + moved + self.cost.calls * self.speed.call / self.batch

    def passes(self, bytes_needed: float) -> int:
        """How often the calibration set is run when so much cannot be held at once."""
        return max(1, -(-round(bytes_needed) // 2**30))

    def over_layers(self, work: Callable[[LayerCost], float]) -> float:
        return sum(work(layer) for layer in self.cost.layers)

    # Stages, in order

    def drawn(self, canonical: int, result: int) -> None:
        """A build that never runs its model: weights pass through memory layer by layer, drawn ones are never in it."""
        recipe, speed, cost = self.recipe, self.speed, self.cost
        absent = self.plan.random
        largest = max(_FLOAT * layer.parameters for layer in cost.layers)
        drawing = cost.parameters / speed.drawn if absent else 0.0
        self.resident = _PROCESS + self.plan.companions + (0 if absent else self.weights)
        self.add(
            "load", _MODULE_CALLS * cost.calls * speed.call + (0 if absent else self.weights / _READ), 0, self.resident
        )
        values = 8 * recipe.calibration.rows * _DRAWN_VALUES * len(cost.layers)
        self.add("statistics", values / speed.written, 0, self.resident + values, values)
        seconds = drawing + cost.weights / speed.candidates + 8 * _FLOAT * cost.weights / speed.copied
        seconds += values / 8 / speed.candidates + cost.weights / speed.written
        self.add("plan", seconds, 0, self.resident + 8 * largest, cost.weights)
        self.graphs(canonical, result)
        copied = (2 if self._engine else 1) * result
        self.add("bundle", copied / speed.written + 2 * copied / _READ, 0, self.resident, copied)

    def load(self) -> None:
        seconds = 2 * self.cost.parameters / self.speed.drawn if self.plan.random else self.weights / _READ * 3
        self.add("load", seconds, 0, self.resident + self.weights * (not self.plan.random))

    def calibrate(self) -> None:
        recipe, speed = self.recipe, self.speed
        values = _FLOAT * sum(self.cost.layers[0].input_shape) * 40 * self.entries
        working = self.resident + self.activations
        self.add("trajectories", 0, self.sampled, working, values)
        if recipe.scaling.method != "none":
            proposals = _PROPOSALS if recipe.scaling.method == "auto" else 1
            entries = min(self.entries, _SCALING_ENTRIES)
            vectors = entries * -(-_VECTORS // entries)
            sampled = self.over_layers(lambda layer: _FLOAT * vectors * layer.width)

            def judged(layer: LayerCost) -> float:
                weight = min(layer.parameters, _JUDGED)
                searched = _QUICK_CANDIDATES * (weight + vectors * layer.width / (9 if layer.convolution else 1))
                moved = 10 * _FLOAT * vectors * layer.width / speed.copied
                return proposals * (searched / speed.candidates + moved + vectors * weight / speed.products)

            runs = self.passes(sampled) * entries
            observed = runs * self.cost.input_values * 3 * _FLOAT / speed.copied
            self.add("scaling", self.over_layers(judged) + observed, runs + 2, working + min(sampled, 2**30))
        rows = recipe.calibration.rows
        kept = 8 * rows * recipe.calibration.samples_per_row * len(self.cost.layers)
        observed = self.entries * self.cost.input_values * _PASSES_OBSERVED * _FLOAT / speed.copied
        self.add("statistics", observed + kept / speed.written, self.entries, working + 2 * kept, kept)

    def quantize(self) -> None:
        recipe, speed = self.recipe, self.speed
        refined = recipe.quantization.rounding == "second-order" and recipe.widths.weight < 8
        activations = recipe.calibration.rows * recipe.calibration.samples_per_row * _CANDIDATES
        seconds = len(self.cost.layers) * activations / speed.candidates + self.cost.weights / speed.written
        seconds += self.over_layers(lambda layer: layer.parameters * _candidates(layer)) / speed.candidates
        memory, forwards = self.resident + 2.5 * self.cost.weights, 0.0
        if refined:
            entries = min(self.entries, _REFINE_ENTRIES)
            positions = _POSITIONS * -(-entries // self.batch)

            def moments(layer: LayerCost) -> float:
                seen = min(positions, layer.positions * entries)
                return 2.0 * seen * layer.width * _block(layer) / speed.products

            def rounded(layer: LayerCost) -> float:
                blocks, width, outputs = layer.width / _block(layer), _block(layer), layer.weight[0]
                solved = blocks * (1.5 * width**3 + 2.5 * outputs * width**2) / speed.products
                columns = layer.width * (12 * speed.call + 3 * _FLOAT * outputs * 64 / speed.copied)
                return solved + columns

            held = self.over_layers(lambda layer: 8 * layer.width * _block(layer))
            runs = self.passes(held * 2**30 / (1.5 * self.plan.working))
            moved = runs * entries / self.batch * self.over_layers(
                lambda layer: 6 * _FLOAT * self.batch * layer.inputs * (9 if layer.convolution else 1)
            ) / speed.copied  # fmt: skip
            seconds += self.over_layers(moments) + self.over_layers(rounded) + moved
            forwards = runs * entries
            memory += min(held, 1.5 * self.plan.working) + self.activations
        self.add("plan", seconds, forwards, memory, self.cost.weights)

    def train(self) -> None:
        """Roughly: three forwards' worth for each sample of each step; trajectories are sampled and answered."""
        training = self.recipe.training
        blocks, network, sampler = training.blocks, training.network, training.sampler
        samples = 3.0 * (network.iterations * network.batch_size + blocks.iterations * blocks.batch_size)
        whole = self.plan.steps * self.plan.halves
        samples += training.trajectories * whole * 2
        if sampler.iterations:
            drawn = (4.0 if sampler.recompute else 3.0) * sampler.batch_size * sampler.iterations
            samples += whole * (drawn + 9 * sampler.held_out + 2 * training.trajectories)
        memory = self.resident + 4 * self.weights + 32 * TORCH_SHARE * self.cost.live_bytes
        self.add("train", 0, samples, memory, self.weights + self.cost.weights)

    def graphs(self, canonical: int, result: int) -> None:
        speed, calls = self.speed, self.cost.calls
        export = calls * _EXPORT_CALLS * speed.call + 3 * self.weights / speed.copied + self.weights / speed.written
        if self.recipe.drawn:
            export += self.cost.parameters / speed.drawn if self.plan.random else 0.0
            self.add("export", export, 0, self.resident + 600e6, self.weights)
        else:
            self.add("export", export, 0, self.resident + 0.3 * self.weights + 2 * self.activations, self.weights)
        written = canonical + result
        seconds = 2 * calls * _PASS_CALLS * speed.call + written / speed.written + 6 * self.cost.weights / speed.copied
        self.add("passes", seconds, 0, self.resident + 0.1 * self.weights, written)
        if self.recipe.target is Target.TRT_RTX:
            seconds = calls * _EXPORT_CALLS * speed.call + 40 * result / speed.copied
            self.add("compile", seconds, 0, self.resident + 900e6 + 4 * result, 1.1 * result)

    def judge(self, result: int) -> None:
        speed, size, cost = self.speed, self.size, self.cost
        one = 1.3 * cost.macs / speed.macs + 6 * _FLOAT * cost.input_values / speed.copied + cost.calls * speed.call
        unpacked = 2 * _FLOAT * cost.weights / speed.copied  # integers become floats in every run of these graphs
        session = cost.calls * _SESSION_CALLS * speed.call + self.weights / speed.copied
        pictures = size.images * self.plan.steps * self.plan.halves
        self.add("reference", 0, pictures, self.resident + self.activations)
        answers = 3 * size.entries + 2 * size.layer_entries + pictures
        batches = answers / size.batch_size
        working = size.batch_size * GRAPH_SHARE * cost.graph_bytes
        layers = size.layer_batch * (GRAPH_SHARE * cost.graph_bytes + 2 * cost.output_bytes)
        memory = self.resident + self.weights + max(working, result + layers)
        self.add("validate", answers * one + batches * unpacked + 5 * session, 0, memory)
        bundle = 4 * session + 8 * one + result / speed.written + result / _READ
        memory = self.resident + self.weights + result + working
        self.add("bundle", bundle, 0, memory, (2 if self._engine else 1) * result)

    @property
    def _engine(self) -> bool:
        return self.recipe.target is Target.TRT_RTX


def _candidates(layer: LayerCost) -> float:
    """Times that each of the layer's weights is judged while its range is searched."""
    if layer.width <= _LONG:
        return _CANDIDATES
    return _CANDIDATES * _LONG / layer.width + 50


def _block(layer: LayerCost) -> int:
    return layer.width if layer.width <= _BLOCK_WIDTH else _WIDE
