"""The options that several verbs share, each with its line of the manual."""

from pathlib import Path
from typing import Annotated

import typer

ModelOption = Annotated[
    str | None,
    typer.Option(
        "-m", "--model", metavar="MODEL", help="Preset (`dmqexport models`), hub id, diffusers folder, or .safetensors."
    ),
]
OutputOption = Annotated[
    Path, typer.Option("-o", "--output", metavar="FOLDER", help="The bundle. Work goes to FOLDER.work beside it.")
]
BitsOption = Annotated[
    str | None,
    typer.Option("--bits", metavar="wNaM", help="Weight and activation bits: w4a4, w8a8 (default), w4a16 ..."),
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target", metavar="TARGET", help="onnx, ort-cpu (default), openvino, trt-rtx or trt; see `dmqexport doctor`."
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="fast, default, full, dmq, efficientdm, dilatequant, or a YAML file as --dry-run prints it; options win.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key, e.g. calibration.batch_size=8. May be repeated."),
]
RowsOption = Annotated[
    int | None, typer.Option("--rows", metavar="N", help="Rows of the timestep table: groups of timesteps. Default 10.")
]
StepsOption = Annotated[
    int | None, typer.Option("--steps", metavar="N", min=1, help="Denoising steps. Default: the model's.")
]
SchedulerOption = Annotated[
    str | None, typer.Option("--scheduler", metavar="NAME", help="ddim, ddpm, euler ... Default: the model's.")
]
PromptsOption = Annotated[
    Path | None, typer.Option("--calib-prompts", metavar="FILE", help="Calibration prompts, one a line.")
]
SizeOption = Annotated[
    int | None, typer.Option("--calib-size", metavar="N", help="Float trajectories to calibrate on. Default 64.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="Where the float model runs: auto (default), cpu, cuda, cuda:N."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", metavar="DTYPE", help="Of trajectories: float32 (default), bfloat16 or float16."),
]
RandomStatisticsOption = Annotated[
    bool,
    typer.Option(
        "--random-statistics",
        help="Draw activation ranges instead of running the model: a bundle to prove size and structure, not to use.",
    ),
]
MaxRamOption = Annotated[
    str | None,
    typer.Option("--max-ram", metavar="SIZE", help="Resident memory to keep to, e.g. 14GiB; refused if it cannot do."),
]
MaxDiskOption = Annotated[
    str | None,
    typer.Option("--max-disk", metavar="SIZE", help="Disk for work and bundle, e.g. 20GiB; refused if it cannot do."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of everything random. Default 0.")]
MixedOption = Annotated[
    bool, typer.Option("--mixed", help="Allocate bits layer by layer; --bits are then the averages.")
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="SIZE",
        help="One budget, with --mixed: 2.5MiB of stored weights, 4.5bits of weights and activations, or 1.2ms.",
    ),
]
ParetoOption = Annotated[
    bool, typer.Option("--pareto", help="Also allocate at budgets around this one: pareto.json and pareto.svg.")
]
AttentionOption = Annotated[
    int | None,
    typer.Option("--attention-bits", metavar="N", help="Quantize the attention matmuls too. Default: float."),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="NAME",
        help="TensorRT: int8 (default), int4-weight-only, fp8, nvfp4, or best (int8, the rest in half precision).",
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")
]
VariantOption = Annotated[
    str | None,
    typer.Option("--variant", metavar="fp16|bf16", help="Weights to take where a model has several. Default: plain."),
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:SCALE]", help="Fuse a LoRA adapter before quantization. May be repeated."),
]
WeightsOption = Annotated[
    str | None,
    typer.Option("--weights", metavar="WHICH", help="stored (default), or random: full size without the files."),
]
WorkOption = Annotated[Path | None, typer.Option("--work", metavar="FOLDER", help="Work folder, instead of -o's.")]
ResumeOption = Annotated[bool, typer.Option("--resume/--no-resume", help="Reuse finished stages, or do all anew.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved recipe and what a build will take, and stop.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable result on standard output.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Log details, and tracebacks of errors.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Only errors and the result.")]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle folder, the -o of a build.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", metavar="N", min=1, help="Threads. Default: every core.")
]
VerifyOption = Annotated[bool, typer.Option("--verify", help="Check the sha256 of every file first.")]
RebuildOption = Annotated[
    bool, typer.Option("--rebuild", help="If it does not fit this machine, build it anew from the graph it keeps.")
]
