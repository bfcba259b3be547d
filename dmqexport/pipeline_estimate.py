"""What a build will take, stage by stage: time, memory, disk. From counts of the model and the machine's own speed.

The formulas say how often each kind of work is done, as the stages do it; the speed of that work is measured on the
spot. Nothing here is a result of an earlier build.
"""

from dataclasses import dataclass

from calib.input_moments import displaced_pays, displaced_products, paired_products
from dmqexport.models.footprint import Footprint, LayerCost
from dmqexport.models.picture_features import DIMENSION
from dmqexport.pipeline_estimate_training import REALLOCATED_ENTRIES, REALLOCATED_PROBES, ChoiceEstimate
from dmqexport.pipeline_estimate_work import FLOAT, PROCESS, QUICK, Plan, StageEstimate
from dmqexport.pipeline_size import GRAPH_SHARE, ValidationSize
from dmqexport.pipeline_speed import MachineSpeed
from dmqexport.quant_types import MAX_BITS
from dmqexport.recipe import Recipe
from dmqexport.report.frechet import enough_pictures
from dmqexport.target import Target

VECTORS, JUDGED = 768, 2**19  # calib/channel_scaling.py
_PROPOSALS = 10
LARGEST_INPUT, WIDE_BLOCK, POSITIONS, SWEEPS, BLOCK = 4608, 1152, 2**16, 4, 128  # calib/second_order.py
SCALING_ENTRIES = 256  # dmqexport/pipeline_calibrate.py
INLINE = 2**26  # dmqexport/onnx_export.py
DRAWN_VALUES = 256  # calib/drawn.py
_READ = 1.5e9  # bytes a second of files that were just written; hashing is slower than reading
_PASSES_OBSERVED = 14  # times that an observed tensor goes through memory, beside the layer
# What is done for each operator of the model, in calls of a small operator:
_MODULE_CALLS, _EXPORT_CALLS, _PASS_CALLS, _SESSION_CALLS, _ENGINE_CALLS = 100, 7000, 300, 400, 7000
# The bundled model's training set, and for each of its pictures that are judged: values, times each is in memory.
CAPTURED, _PICTURE, _COMPARED = 1355, 3 * 64 * 64, 45
_TIMED = (Target.ORT_CPU, Target.OPENVINO)

__all__ = ["Estimate", "Plan", "StageEstimate", "estimate"]


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


def estimate(recipe: Recipe, cost: Footprint, speed: MachineSpeed, plan: Plan, size: ValidationSize) -> Estimate:
    """Estimate every stage of `dmqexport build` with `recipe`."""
    return _Estimator(recipe, cost, speed, plan, size).estimate()


class _Estimator(ChoiceEstimate):
    def estimate(self) -> Estimate:
        bits = self.recipe.widths
        packed = 0.5 if bits.weight <= 4 else 1.0
        whole = 1.0 if self.recipe.target in (Target.TRT, Target.TRT_RTX) else packed
        rest = FLOAT * (self.cost.parameters - self.cost.weights) + 4000 * len(self.cost.layers)
        canonical, result = (round(share * self.cost.weights + rest) for share in (packed, whole))
        if self.recipe.drawn:
            self.drawn(canonical, result)
            return Estimate(tuple(self.stages), result, canonical)
        self.load()
        self.calibrate()
        if self.allocates and self.recipe.allocation.metric != "picture":
            self.allocate()
        self.drafts()
        if self.allocates and self.recipe.allocation.metric == "picture":
            self.allocate()
        self.remainders()
        self.row_bits()
        if self.recipe.trains_on_calls and not self.recipe.keeps_calls:
            self.training_set()
        self.tabulate()
        self.reallocate()
        self.quantize()
        self.train()
        self.graphs(canonical, result)
        self.judge(result)
        return Estimate(tuple(self.stages), result, canonical)

    # Stages, in order

    def drawn(self, canonical: int, result: int) -> None:
        """A build that never runs its model: weights pass through memory layer by layer, drawn ones are never in it."""
        speed, cost = self.speed, self.cost
        absent = self.plan.random
        largest = max(FLOAT * layer.parameters for layer in cost.layers)
        drawing = cost.parameters / speed.drawn if absent else 0.0
        self.resident = PROCESS + self.plan.companions + (0 if absent else self.weights)
        self.add(
            "load", _MODULE_CALLS * cost.calls * speed.call + (0 if absent else self.weights / _READ), 0, self.resident
        )
        values = 8 * self.rows * DRAWN_VALUES * len(cost.layers)
        self.add("statistics", values / speed.written, 0, self.resident + values, values)
        seconds = drawing + 2 * cost.weights / speed.candidates + self.coding()
        self.add("plan", seconds, 0, self.resident + 8 * largest, cost.weights)
        self.graphs(canonical, result)
        self.add("check", result / _READ, 0, self.resident)
        copied = self._copied(result)
        self.add("bundle", copied / speed.written + 2 * copied / _READ, 0, self.resident, copied)

    def load(self) -> None:
        seconds = 2 * self.cost.parameters / self.speed.drawn if self.plan.random else self.weights / _READ * 3
        self.add("load", seconds, 0, self.resident + self.weights * (not self.plan.random))

    def calibrate(self) -> None:
        recipe, speed = self.recipe, self.speed
        working = self.resident + self.activations
        self.add("trajectories", 0, self.sampled, working, self.entries * self.cost.entry_bytes)
        if recipe.scaling.method != "none":
            proposals = _PROPOSALS if recipe.scaling.method == "auto" else 1
            entries = min(self.entries, SCALING_ENTRIES)
            vectors = entries * -(-VECTORS // entries)
            sampled = self.over_layers(lambda layer: FLOAT * vectors * layer.width)

            def judged(layer: LayerCost) -> float:
                weight = min(layer.parameters, JUDGED)
                # Activations twice: rows are padded to one length, and thresholds are looked for as well.
                searched = QUICK * (weight + 2 * vectors * layer.width / (9 if layer.convolution else 1))
                moved = FLOAT * (40 * vectors * layer.width + 20 * weight) / speed.copied
                called = 500 * speed.call
                return proposals * (searched / speed.candidates + moved + called + vectors * weight / speed.products)

            runs = max(1, -(-round(sampled) // 2**30)) * entries
            observed = runs * self.cost.input_values * 3 * FLOAT / speed.copied
            self.add("scaling", self.over_layers(judged) + observed, runs + 2, working + min(sampled, 2**30))
        kept = 8 * self.rows * self.over_layers(self.sampled_values)
        observed = self.entries * self.cost.input_values * _PASSES_OBSERVED * FLOAT / speed.copied
        self.add("statistics", observed + 4 * kept / speed.written, self.entries, working + 2 * kept, kept)

    def quantize(self) -> None:
        recipe, cost = self.recipe, self.cost
        widths = recipe.widths
        # Fitted weights are searched once, where they are rounded; before that their ranges are min-max.
        seconds = self.activation_search(widths.activation) + self.coding()
        seconds += self.weight_search(widths.weight, self.fits)
        memory, forwards = self.resident + 2.5 * cost.weights, 0.0
        if self.fits:
            own = recipe.quantization.refine_on == "training"
            entries = min(self.training_entries if own else self.entries, recipe.quantization.refine_entries)
            fitting, runs, held = self._moments(entries)
            seconds += fitting + self.over_layers(self._fitted)
            forwards = runs * entries
            memory += min(held, 1.5 * self.plan.working) + self.activations
        self.add("plan", seconds, forwards, memory, cost.weights)

    def tabulate(self) -> None:
        """Activations rounded at every width along trajectories, and gradients of where those end."""
        if not (self.reallocates and self.varies):
            return
        recipe, training, cost = self.recipe.allocation, self.recipe.training, self.cost
        samples = min(recipe.trajectories, training.trajectories) * self.plan.calls
        widths = sum(bits < MAX_BITS for bits in recipe.activation_bits)
        read = self.over_layers(lambda layer: layer.inputs)
        # Rounded and multiplied with the gradient: five passes over what layers read, for every width and direction.
        seconds = samples * REALLOCATED_PROBES * (2 * self.forward + widths * 10 * FLOAT * read / self.speed.copied)
        kept = self.plan.calls / (self.plan.steps if training.sampler.recompute else 1)
        disk = 8 * widths * self.rows * len(cost.layers) * (samples / self.plan.calls)
        self.add("activation-bits", seconds, samples, self.resident + kept * self.saved, disk)

    def reallocate(self) -> None:
        """Weights rounded at every width, and gradients of where trajectories end with respect to each."""
        if not self.reallocates:
            return
        recipe, speed, cost, training = self.recipe.allocation, self.speed, self.cost, self.recipe.training
        entries = min(REALLOCATED_ENTRIES, self.recipe.quantization.refine_entries)
        fitting, runs, held = self._moments(entries)
        widths = recipe.weight_bits
        seconds = fitting + sum(self.weight_search(bits, fitted=True) for bits in widths)
        seconds += len(widths) * self.over_layers(self._fitted)
        count = min(recipe.trajectories, training.trajectories)
        samples = count * self.plan.calls
        seconds += samples * REALLOCATED_PROBES * 2 * self.forward
        seconds += count * REALLOCATED_PROBES * len(widths) * 4 * FLOAT * cost.weights / speed.copied
        kept = self.plan.calls / (self.plan.steps if training.sampler.recompute else 1)
        memory = self.resident + 2 * self.weights
        memory += max(min(held, 1.5 * self.plan.working) + self.activations, kept * self.saved)
        self.add("weight-bits", seconds, runs * entries + samples, memory, len(widths) * self.weights / 2)

    def _moments(self, entries: int) -> tuple[float, int, float]:
        """(seconds beside the forwards, passes over the entries, bytes) of second moments of all that is read."""
        speed = self.speed

        def moments(layer: LayerCost) -> float:
            batch = min(self.batch, entries)
            positions = layer.positions * batch
            kept = min(-(-POSITIONS * batch // entries), positions)
            each, gathered = kept * paired_products(_block(layer)), 2.0 * kept * layer.width
            shape = layer.weight[2:], layer.input_shape[1:]
            if _uniform(layer) and displaced_pays(*shape, _block(layer), positions, kept):
                each, gathered = positions * displaced_products(*shape), 0.0
            # Sums as large as the squares are written once a batch, which few positions do not hide.
            passed = FLOAT * (6 * layer.width * _block(layer) + gathered) / speed.copied
            return entries / batch * (layer.width * _block(layer) * each / speed.products + passed)

        def moved(layer: LayerCost) -> float:
            """Both inputs, quantized and padded, go through memory."""
            return entries * (20 if layer.convolution else 12) * FLOAT * layer.inputs / speed.copied

        held = self.over_layers(lambda layer: 8 * layer.width * _block(layer))
        runs = max(1, -(-round(held) // (3 * self.plan.working // 2)))
        return self.over_layers(moments) + self.over_layers(moved), runs, held

    def _fitted(self, layer: LayerCost) -> float:
        """Seconds of refitting a layer's weight and rounding it, its moments given."""
        speed, width, outputs = self.speed, _block(layer), layer.weight[0]
        factored = 2 / 3 * width**3  # two Cholesky factors, which run at half the speed of products
        # The target, its solution, half a product in compensation, and one a sweep.
        multiplied = (2.5 + SWEEPS) * outputs * width**2
        solved = layer.width / width * (factored + multiplied) / speed.products
        # Column by column: four operators on [outputs] and a product with half a block of columns, read from a cache.
        column = 6 * speed.call + FLOAT * outputs * (BLOCK / 4 + 16) / speed.copied
        return solved + layer.width * (1 + SWEEPS) * column

    def graphs(self, canonical: int, result: int) -> None:
        speed, calls, drawn = self.speed, self.cost.calls, self.recipe.drawn
        export = calls * _EXPORT_CALLS * speed.call + 3 * self.weights / speed.copied + self.weights / speed.written
        # Weights of a large model lie beside the graph and are shared by its second form.
        graphs = self.weights if self.weights > INLINE else 2 * self.weights
        memory = self.resident + (600e6 if drawn else 0.3 * self.weights + 2 * self.activations)
        export += self.cost.parameters / speed.drawn if drawn and self.plan.random else 0.0
        self.add("export", export, 0, memory, graphs)
        written = canonical + result
        seconds = 2 * calls * _PASS_CALLS * speed.call + written / speed.written + 6 * self.cost.weights / speed.copied
        self.add("passes", seconds, 0, self.resident + 0.1 * self.weights, written)
        if self.recipe.target is Target.TRT_RTX:
            seconds = calls * _ENGINE_CALLS * speed.call + 40 * result / speed.copied
            self.add("compile", seconds, 0, self.resident + 900e6 + 4 * result, 1.1 * result)

    def judge(self, result: int) -> None:
        recipe, speed, size, cost = self.recipe.validation, self.speed, self.size, self.cost
        moved = 8 * FLOAT * cost.input_values / speed.copied
        one = 1.3 * cost.macs / speed.macs + moved + cost.calls * speed.call / size.batch_size
        unpacked = 2 * FLOAT * cost.weights / speed.copied  # integers become floats in every run of these graphs
        session = cost.calls * _SESSION_CALLS * speed.call + self.weights / speed.copied
        features = self.plan.feature_macs
        pictures = max(size.images, recipe.retrieval) if features else size.images
        drawn, seen = pictures * self.plan.calls, _PICTURE * pictures if features else 0
        recorded = size.images * self.plan.calls * cost.entry_bytes
        self.add("reference", 0, drawn, self.resident + self.activations, recorded + seen)
        described = 0.0
        if features and recipe.frechet and enough_pictures(pictures, DIMENSION):
            described = features / speed.macs
            self.add("features", CAPTURED * described, 0, self.resident)
        answers = 3 * size.entries + 2 * size.layer_entries + drawn
        working = size.batch_size * GRAPH_SHARE * cost.graph_bytes
        layers = size.layer_batch * (GRAPH_SHARE * cost.graph_bytes + 2 * cost.output_bytes)
        seconds = answers * (one + unpacked / size.batch_size) + 5 * session + 2 * pictures * described
        compared = _COMPARED * FLOAT * _PICTURE * pictures if features else 0
        memory = self.resident + self.weights + max(working, result + layers, compared)
        self.add("validate", seconds, 0, memory, seen)
        timed = 2 * recipe.latency_runs * recipe.latency_batch if self.recipe.target in _TIMED else 0
        seconds = 4 * session + (8 + timed) * one + result / speed.written + result / _READ
        memory = self.resident + self.weights + result + working
        self.add("bundle", seconds, 0, memory, self._copied(result) + self.plan.companions)

    def _copied(self, result: int) -> int:
        """Bytes of graphs and engine in the bundle."""
        return 2 * result if self.recipe.target is Target.TRT_RTX else result


def _block(layer: LayerCost) -> float:
    """Inputs that are compensated together."""
    return layer.width if layer.width <= LARGEST_INPUT else layer.width / -(-layer.width // WIDE_BLOCK)


def _uniform(layer: LayerCost) -> bool:
    """Whether products of taps are summed by their displacement."""
    padded = (2 * pad + 1 for pad in layer.padding)
    return layer.convolution and tuple(layer.stride) == (1, 1) and tuple(padded) == tuple(layer.weight[2:])
