"""What `dmqexport bench` prints."""

from collections.abc import Mapping
from typing import Any

from dmqexport.cli_console import columns

#: How many layers and operators are worth reading on a terminal; the JSON has them all.
_MOST = 12


def print_bench(result: Mapping[str, Any]) -> None:
    """The result of `dmqexport.bench.bench_bundle`: one line, and its tables where there are any."""
    print(
        f"batch {result['batch']}, {result['threads']} threads, {result['runs']} runs each: "
        f"fp32 {result['fp32_ms']:.2f} ms, quantized {result['quantized_ms']:.2f} ms, ratio {result['ratio']:.3f}"
    )
    if "runtimes" not in result:
        return
    print(f"ratio of minima {result['minimum_ratio']:.3f}, of processor time {result['processor_ratio']:.3f}")
    trajectory = result["trajectory"]
    print(
        f"trajectory of {trajectory['steps']} calls, {trajectory['pictures']:g} pictures: "
        f"fp32 {trajectory['fp32_ms']:.1f} ms, quantized {trajectory['quantized_ms']:.1f} ms, "
        f"ratio {trajectory['ratio']:.3f}"
    )
    mixed = result["mixed"]
    print(
        f"a batch of {mixed['rows']} table rows: fp32 {mixed['fp32_ms']:.2f} ms, quantized "
        f"{mixed['quantized_ms']:.2f} ms, ratio {mixed['ratio']:.3f}"
    )
    head = ("runtime", "precision", "median", "least", "ratio", "peak memory")
    rows = [
        (
            str(row["runtime"]),
            str(row["precision"]),
            f"{row['median_ms']:.2f} ms",
            f"{row['minimum_ms']:.2f} ms",
            f"{row['ratio']:.3f}",
            "unknown" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**20:.0f} MiB",
        )
        for row in result["runtimes"]
    ]
    print(columns([head, *rows]))
    for row in result["runtimes"]:
        if row["note"]:
            print(f"{row['runtime']} {row['precision']}: {row['note']}")
    for row in result["left_out"]:
        print(f"{row['runtime']} {row['precision']} left out: {row['reason']}")
    slower = sorted((row for row in result["layers"] if (row["ratio"] or 0) > 1), key=lambda row: -row["quantized_ms"])
    if result["layers"]:
        print(f"{len(slower)} of {len(result['layers'])} layers are slower than in float, quantizers and all:")
        named = [
            (row["layer"], f"{row['fp32_ms']:.3f} ms", f"{row['quantized_ms']:.3f} ms", f"{row['ratio']:.2f}")
            for row in slower[:_MOST]
        ]
        if named:
            print(columns([("layer", "fp32", "quantized", "ratio"), *named]))
    peaks = result.get("peaks")
    if peaks:
        print(
            f"peaks here: {peaks['gflops']:.0f} GFLOP/s in float32, {peaks['int8_gops']:.0f} in int8, "
            f"{peaks['gbytes']:.1f} GB/s of memory"
        )
    for side, table in result["operators"].items():
        print(f"operators, {side}:")
        lines = [
            (
                row["op"],
                " x ".join(str(list(shape)) for shape in row["shapes"]),
                f"{row['count']}",
                f"{row['ms']:.3f} ms",
                f"{row['gflops']:.1f} GFLOP/s" if row["gflops"] else "",
                f"{row['gbytes']:.1f} GB/s",
                f"{row['of_peak']:.0%} of {row['bound']}" if peaks else "",
                f"{row['share']:.1%}",
            )
            for row in table[:_MOST]
        ]
        print(columns([("operator", "shapes", "nodes", "time", "arithmetic", "traffic", "of peak", "share"), *lines]))
