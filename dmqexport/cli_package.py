"""The verb that hands a bundle to an inference server."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dmqexport.cli_log import start_logging
from dmqexport.cli_options import BundleArgument, JsonOption, ThreadsOption, VerboseOption, VerifyOption
from dmqexport.errors import RecipeError


def package(
    bundle: BundleArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="REPO", help="Model repository; may hold other models.")
    ],
    form: Annotated[str, typer.Option("--format", metavar="FORMAT", help="triton: NVIDIA Triton Inference Server.")],
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Default: the bundle's folder.")] = None,
    version: Annotated[int, typer.Option("--version", metavar="N", min=1, help="Version folder to write.")] = 1,
    device: Annotated[
        str | None, typer.Option("--device", metavar="cpu|gpu", help="Default: gpu for target trt, cpu for others.")
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option("--max-batch", metavar="N", min=1, help="Default: the recipe's lowering.max_batch.")
    ] = None,
    delay_us: Annotated[
        int, typer.Option("--delay-us", metavar="N", min=0, help="How long a request may wait for others to join it.")
    ] = 500,
    instances: Annotated[int, typer.Option("--instances", metavar="N", min=1, help="Copies on each device.")] = 1,
    threads: ThreadsOption = None,
    verify: VerifyOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write a bundle as a model for an inference server.

    \b
      dmqexport package out/emoji --format triton -o models --name emoji
      tritonserver --model-repository models

    Bundles for onnx and ort-cpu are served by the ONNX Runtime backend, trt's engine by the TensorRT backend. Requests
    of different timesteps share batches. A further --version is added beside those that are there.
    """
    start_logging(verbose=verbose)
    from dmqexport.bundle import open_bundle
    from dmqexport.package import Device, PackageFormat, TritonOptions, write_triton

    if form not in list(PackageFormat):
        raise RecipeError(f"--format {form!r} is not known", hint=f"known: {', '.join(PackageFormat)}")
    if device is not None and device not in list(Device):
        raise RecipeError(f"--device {device!r} is not known", hint=f"known: {', '.join(Device)}")
    chosen = None if device is None else Device(device)
    options = TritonOptions(name, version, chosen, max_batch, delay_us, instances, threads)
    opened = open_bundle(bundle, verify=verify)
    made = write_triton(opened, output, options)
    if as_json:
        shown = {"folder": str(made.folder), "name": made.name, "version": made.version, "model": str(made.model)}
        print(json.dumps(shown, indent=1))
        return
    print(f"{made.model}: version {made.version} of {made.name}")
    needs = opened.manifest["session"].get("cpu_features", [])
    if needs:
        print(f"it computes right only on CPUs with {', '.join(needs).upper()}")
