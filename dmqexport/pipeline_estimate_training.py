"""What drafts, allocation and training take: the stages between statistics and graphs that only some recipes have."""

from dmqexport.pipeline_estimate_work import FLOAT, Work, kept_calls
from dmqexport.pipeline_size import TORCH_SHARE, sketch_bytes, sketch_within
from dmqexport.quant_types import MAX_BITS
from dmqexport.recipe_training import BlockTrainingRecipe, NetworkTrainingRecipe

PICTURES, STEP_CALLS, OFFSETS = 16, 16, 5  # dmqexport/pipeline_drafts.py, dmqexport/pipeline_rows.py
JUDGES, SHIFTS = 4, 7  # dmqexport/pipeline_allocate.py
REALLOCATED_PROBES, REALLOCATED_ENTRIES = 2, 2048  # dmqexport/pipeline_reallocate.py
TRAINING_TRAJECTORIES = 512  # dmqexport/pipeline_train.py
TRIALS = 9  # calib/trajectory_distill.py, the untrained state among them
_GRADED = 40  # times that a value goes through memory while it is quantized and its gradient found
_UPDATED = 60  # times that a weight does in an iteration: quantized, its gradient, the optimizer's moments
_SAVED = 5  # float values kept for the gradient, for each that a layer reads or gives


class ChoiceEstimate(Work):
    """Stages that choose bits or train, each with a method of its own."""

    # Which of them there are, as the stages themselves decide

    @property
    def allocates(self) -> bool:
        """Whether widths come from a budget."""
        return self.recipe.allocation.allocates

    @property
    def fits(self) -> bool:
        """Whether weights are fitted and rounded by second order."""
        return self.recipe.quantization.rounding == "second-order"

    @property
    def varies(self) -> bool:
        """Whether timestep rows may get bits of their own."""
        bits = self.recipe.widths.activation
        measured = self.recipe.quantization.row_bits == "measured" and bits is not None
        return measured and (self.allocates or bits != MAX_BITS)

    # Drafts

    def draft(self) -> None:
        """A plan rounded to the nearest code."""
        widths = self.recipe.widths
        seconds = self.activation_search(widths.activation) + self.weight_search(widths.weight) + self.coding()
        self.add("draft", seconds, 0, self.resident + 2 * self.cost.weights, self.cost.weights)

    def drafts(self) -> None:
        """Drafts, and what each step's error does to pictures: whole pictures, once for every step."""
        training, quantization = self.recipe.training, self.recipe.quantization
        picture = (self.allocates or self.remains) and self.recipe.allocation.metric == "picture"
        trained = training.network.iterations > 0 and training.network.step_weights == "measured"
        weighed = quantization.row_bits == "measured" and self.fits
        if picture or trained or weighed or self.varies:
            self.draft()
            calls = PICTURES * self.plan.calls
            live = PICTURES * self.plan.halves * TORCH_SHARE * self.cost.live_bytes
            simulated = calls * (self.forward + self.quantizing)
            self.add("step-errors", simulated, calls * (self.plan.steps + 1), self.resident + 2 * self.weights + live)
        elif quantization.row_bits == "measured" and self.recipe.widths.activation is not None:
            self.draft()  # it is only found that 8-bit rows do not vary

    def row_bits(self) -> None:
        """Bits of timestep rows; with allocation, from a draft at the allocated widths."""
        if not self.varies:
            return
        if self.allocates:
            self.draft()
        calls = STEP_CALLS * self.plan.calls
        seconds = OFFSETS * (calls * self.quantizing + self.activation_search(self.recipe.widths.activation))
        memory = self.resident + 2 * self.weights + self.activations
        self.add("row-bits", seconds, (OFFSETS + 1) * calls, memory)

    @property
    def remains(self) -> bool:
        """Whether remainders are chosen by measurement (dmqexport/pipeline_remainder.py)."""
        share, activation = self.recipe.quantization.remainder_share, self.recipe.widths.activation
        return share > 0 and activation == MAX_BITS and not self.allocates

    @property
    def _sketch_batch(self) -> int:
        return sketch_within(self.batch, self.cost, self.recipe.allocation.probes, self.plan.working)

    @property
    def sketched(self) -> int:
        """Memory of a sketch's activations and gradients."""
        return self._sketch_batch * sketch_bytes(self.cost, self.recipe.allocation.probes)

    def remainders(self) -> None:
        """Quantizers at 8 bits, and a sketch of what the error of each activation costs."""
        if not self.remains:
            return
        recipe, cost, speed = self.recipe.allocation, self.cost, self.speed
        searched = self.weight_search(MAX_BITS) + self.activation_search(MAX_BITS) + self.coding()
        a_pair = cost.macs / speed.macs + 3 * (1 + recipe.probes) * cost.output_bytes / speed.copied
        seconds = recipe.entries * (a_pair + recipe.probes * 2 * self.forward + self.quantizing) + searched
        memory = self.resident + self.weights + self.sketched
        self.add("remainders", seconds, 2 * recipe.entries, memory)

    # Allocation

    def allocate(self) -> None:
        """Quantizers at all widths, what every layer's error costs, and plans that are measured whole."""
        recipe, cost, speed = self.recipe.allocation, self.cost, self.speed
        activation = self.recipe.widths.activation
        weights = recipe.weight_bits
        widths = {*weights, *(recipe.activation_bits if activation is not None else ())}
        searched = sum(
            self.weight_search(bits) + (self.activation_search(bits) if activation is not None else 0.0)
            for bits in widths
        )
        disk = len(widths) * cost.weights
        self.add("candidates", searched + len(widths) * self.coding(), 0, self.resident + 2 * cost.weights, disk)

        pairs = len(weights) * (len(recipe.activation_bits) if activation is not None else 1)
        products = cost.macs / speed.macs
        outputs = cost.output_bytes / FLOAT
        # Probes are multiplied with every pair's output and summed; single operators, each with its own memory.
        memory = self.resident + self.weights + self.sketched
        if recipe.sensitivity == "sketch":
            a_pair = products + 3 * FLOAT * (1 + recipe.probes) * outputs / speed.copied
            seconds = recipe.entries * (pairs * a_pair + recipe.probes * 2 * self.forward)
            seconds += recipe.entries * len(widths) * self.quantizing
            seconds += -(-recipe.entries // self._sketch_batch) * pairs * 12 * len(cost.layers) * speed.call
            self.add("sensitivity", seconds, 2 * recipe.entries, memory)
        else:  # every layer at every pair, what lies downstream of it
            runs = recipe.entries * len(cost.layers) * pairs / 2
            self.add("sensitivity", runs * self.quantizing / len(cost.layers), runs, memory)

        judged = JUDGES * recipe.entries
        joint = 2 + recipe.relinearize + recipe.proposals
        marginal = recipe.relinearize * recipe.entries * len(cost.layers) / 2
        seconds = (joint * judged + marginal) * self.quantizing
        memory = self.resident + 2 * self.weights + self.activations
        self.add("allocation", seconds, 2 * joint * judged + marginal, memory)
        if recipe.pareto:
            points = SHIFTS + (len(widths) if activation is not None else 0)
            self.add("pareto", points * judged * self.quantizing, 2 * points * judged, memory)

    @property
    def reallocates(self) -> bool:
        """Whether weights' bits are allocated again (dmqexport/pipeline_reallocate.py)."""
        return self.allocates and self.recipe.allocation.trajectories > 0

    # Training

    @property
    def training_entries(self) -> int:
        """Calls that are kept of the training trajectories."""
        training = self.recipe.training
        whole = training.trajectories if training.network.coherence > 0 else TRAINING_TRAJECTORIES
        return kept_calls(training.trajectories, self.plan.calls, whole)

    def training_set(self) -> None:
        """Float trajectories of their own."""
        disk = self.training_entries * self.cost.entry_bytes
        forwards = self.recipe.training.trajectories * self.plan.calls
        memory = self.resident + self.activations + 2 * disk
        self.add("training-set", disk / self.speed.written, forwards, memory, disk)

    @property
    def saved(self) -> float:
        """Bytes that a forward keeps of one sample for its gradient."""
        return _SAVED * (FLOAT * self.cost.input_values + self.cost.output_bytes)

    @property
    def graded(self) -> float:
        """Seconds of one sample forth and back through the quantized model."""
        values = self.cost.input_values
        return 3 * self.forward + _GRADED * FLOAT * values / self.speed.copied

    @property
    def updating(self) -> float:
        """Seconds of one iteration that do not depend on the batch: weights quantized, moved, and their moments."""
        return _UPDATED * FLOAT * self.cost.weights / self.speed.copied

    def train(self) -> None:
        """Block by block, the network as a whole, through the sampler: whichever the recipe has."""
        training, cost = self.recipe.training, self.cost
        saved = self.saved
        moved = self.resident + 4 * FLOAT * cost.weights  # shadow, gradient and two moments of every weight
        state = cost.weights + FLOAT * cost.weights
        blocks, network, sampler = training.blocks, training.network, training.sampler
        if blocks.iterations:
            streamed = 2 * (blocks.entries + blocks.held_out)
            held = min((blocks.entries + blocks.held_out) * 2 * cost.live_bytes, training.max_ram_bytes or float("inf"))
            seconds = self._iterated(blocks) + streamed * self.quantizing / 2
            self.add("blocks", seconds, streamed, moved + held + blocks.batch_size * saved / 8, state)
        if network.iterations:
            kept, written = self.training_entries, self.training_entries * FLOAT * cost.layers[-1].outputs
            memory = self.resident + self.activations + kept * cost.entry_bytes + 2 * written
            self.add("targets", written / self.speed.written, kept, memory, written)
            self.add("network", self._iterated(network), 0, moved + network.batch_size * saved, state)
        if sampler.iterations or self.reallocates:
            ends = training.trajectories * self.plan.calls
            disk = training.trajectories * (self.plan.halves + 1) * cost.entry_bytes
            kept = 2 * self.training_entries * cost.entry_bytes if self.recipe.keeps_calls else 0
            seconds, memory = kept / 2 / self.speed.written, self.resident + self.activations + kept
            self.add("trajectory-ends", seconds, ends, memory, disk + kept / 2)
        if sampler.iterations:
            samples = sampler.batch_size * self.plan.calls
            again = self.forward + self.quantizing if sampler.recompute else 0.0
            seconds = sampler.iterations * (samples * (self.graded + again) + self.updating)
            seconds += TRIALS * sampler.held_out * self.plan.calls * (self.forward + self.quantizing)
            at_once = samples / (self.plan.steps if sampler.recompute else 1)
            self.add("sampler", seconds, 0, moved + at_once * saved, state)

    def _iterated(self, recipe: BlockTrainingRecipe | NetworkTrainingRecipe) -> float:
        return recipe.iterations * (recipe.batch_size * self.graded + self.updating)
