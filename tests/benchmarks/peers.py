# ruff: noqa: T201 - a script talks to its user
"""dmqexport beside other quantizers: same float model, same calibration points, same machine, one table.

    python tests/benchmarks/peers.py -o out/peers
    python tests/benchmarks/peers.py -o out/peers --python nncf=nncf/bin/python --python modelopt=modelopt/bin/python
    python tests/benchmarks/peers.py -o out/peers --store --update README.md     # renew the table of the README
    python tests/benchmarks/peers.py -o out/peers --only ours --store --update README.md   # or some of its rows
    python tests/benchmarks/peers.py --update README.md      # write it again from the stored figures, measure nothing

Every peer quantizes in a process of its own, with the Python that `--python` names for it (default: this one). Nothing
is installed here; a peer that is missing or fails is a row that says why. An environment for a peer is best a virtual
one where its packages and dmqexport are installed, for instance:

    python -m venv nncf && nncf/bin/pip install '.[cpu,openvino]' nncf
    python -m venv modelopt && modelopt/bin/pip install '.[cpu,openvino]' nvidia-modelopt
    python -m venv quanto && quanto/bin/pip install '.[cpu,openvino]' optimum-quanto
    python -m venv optimum && optimum/bin/pip install optimum-onnx onnxruntime     # pins an older transformers

What comes out is executed by its own runtime and judged like a bundle (`peer_judge.py` says how); only where a peer can
write no artefact is its own fake quantization judged, and the table says so. Finished rows are kept in the output
folder: the same command goes on where it was stopped. Latencies want a quiet machine: `--time-again` measures those
anew.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peer_job import machine
from peer_table import markdown, merged, update_readme

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STORED = HERE / "peers.json"
_RESULT = "result.json"


@dataclass(frozen=True)
class Entry:
    """One row. peer: whose Python runs it; script: and arguments; setting: which way it quantizes."""

    key: str
    peer: str
    name: str
    bits: str
    script: tuple[str, ...]
    setting: Mapping[str, Any] = field(default_factory=dict)


def _ours(
    key: str, name: str, bits: str, target: str, *assignments: str, recipe: str | None = "default", note: str = ""
) -> Entry:
    setting = {"target": target, "recipe": recipe, "set": assignments, "note": note}
    return Entry(key, "dmqexport", f"dmqexport, {name}", bits, ("peer_dmqexport.py",), setting)


def _static(
    key: str,
    weights: str,
    activations: str,
    method: str,
    name: str,
    bits: str = "w8a8",
    operators: tuple[str, ...] = (),
) -> Entry:
    setting = {"weights": weights, "activations": activations, "method": method, "operators": operators}
    return Entry(key, "onnxruntime", f"ONNX Runtime `quantize_static`, {name}", bits, ("peer_onnxruntime.py",), setting)


def _nncf(key: str, name: str, bits: str = "w8a8", **setting: Any) -> Entry:
    return Entry(key, "nncf", f"NNCF, {name}", bits, ("peer_nncf.py",), setting)


def _modelopt(key: str, name: str, bits: str, way: str, algorithm: str = "max") -> Entry:
    setting = {"way": way, "algorithm": algorithm}
    return Entry(key, "modelopt", f"Model Optimizer, {name}", bits, ("peer_modelopt.py",), setting)


def _optimum(way: str, name: str, bits: str) -> Entry:
    return Entry(f"optimum-{way}-{bits}", f"optimum-{way}", name, bits, ("peer_optimum.py", way))


PRODUCTS = ("Conv", "MatMul", "Gemm")
MORE_CAPTIONS = "not trained; weights fitted to 1,024 further captions"
ENTRIES: tuple[Entry, ...] = (
    _ours("ours-w8a8", "`ort-cpu`, `--recipe default`", "w8a8", "ort-cpu"),
    _ours(
        "ours-w8a8-some", "the same, `quantization.remainder_share=0.05`", "w8a8", "ort-cpu",
        "quantization.remainder_share=0.05",
    ),
    _ours(
        "ours-w8a8-once", "the same, no second products", "w8a8", "ort-cpu", "quantization.remainder=[]",
        "quantization.remainder_share=0",
    ),
    _ours("ours-w8a8-openvino", "`openvino`, `--recipe default`", "w8a8", "openvino"),
    _ours(
        "ours-openvino-once", "`openvino`, no second products", "w8a8", "openvino", "quantization.remainder=[]",
        "quantization.remainder_share=0",
    ),
    _ours(
        "ours-openvino-attention", "`openvino`, `--recipe default --attention-bits 8`", "w8a8", "openvino",
        "quantization.attention_bits=8",
    ),
    _ours(
        "ours-openvino-attention-once", "`openvino`, no second products, `--attention-bits 8`", "w8a8", "openvino",
        "quantization.attention_bits=8", "quantization.remainder=[]", "quantization.remainder_share=0",
    ),
    _static("ort-s8s8-minmax", "QInt8", "QInt8", "MinMax", "S8S8, min-max"),
    _static("ort-u8s8-minmax", "QInt8", "QUInt8", "MinMax", "U8S8, min-max"),
    _static("ort-s8s8-entropy", "QInt8", "QInt8", "Entropy", "S8S8, entropy"),
    _static("ort-u8s8-entropy", "QInt8", "QUInt8", "Entropy", "U8S8, entropy"),
    _static("ort-products", "QInt8", "QUInt8", "MinMax", "U8S8, min-max, products only", operators=PRODUCTS),
    _optimum("onnx", "optimum, `ORTQuantizer`, AVX-512 VNNI", "w8a8"),
    _nncf("nncf-default", "default", subset=300),
    _nncf("nncf-transformer", "transformer preset (SmoothQuant)", model_type="TRANSFORMER"),
    _optimum("intel", "optimum-intel", "w8a8"),
    _modelopt("modelopt-recipe-w8a8", "its diffusers recipe", "w8a8", "recipe"),
    _modelopt("modelopt-same-w8a8", "our layers, max", "w8a8", "same"),
    _modelopt("modelopt-smooth-w8a8", "our layers, SmoothQuant", "w8a8", "same", "smoothquant"),
    _optimum("quanto", "optimum-quanto", "w8a8"),
    _ours("ours-w4a4", "`ort-cpu`", "w4a4", "ort-cpu", recipe=None),
    _ours(
        "ours-w4a4-mixed", "`ort-cpu`, `--mixed --recipe full`", "w4a4", "ort-cpu", "allocation.mixed=true",
        "training.sampler.iterations=0", recipe="full", note=MORE_CAPTIONS,
    ),
    _modelopt("modelopt-recipe-w4a4", "its diffusers recipe", "w4a4", "recipe"),
    _modelopt("modelopt-same-w4a4", "our layers, mse", "w4a4", "same", "mse"),
    _static("ort-w4a4", "QInt4", "QInt4", "MinMax", "S4S4", "w4a4"),
    _nncf("nncf-w4a4", "default", "w4a4"),
    _optimum("onnx", "optimum, `ORTQuantizer`", "w4a4"),
    _optimum("quanto", "optimum-quanto", "w4a4"),
)  # fmt: skip


class Comparison:
    """One model, and a folder with everything about it."""

    def __init__(self, options: argparse.Namespace) -> None:
        """options: of `_parser`."""
        self.folder: Path = options.output.resolve()
        self.shared = self.folder / "shared"
        named = (item.partition("=")[::2] for item in options.python)
        # Not resolved: a virtual environment's Python is a link, and what it is called decides what it finds.
        self.pythons = {peer: str(Path(path).absolute()) if "/" in path else path for peer, path in named}
        self.options = options
        work = self.folder / "work" if options.work is None else options.work.resolve()
        self.judge = {
            "model": options.model,
            "work": str(work),
            "shared": str(self.shared),
            "pictures": options.pictures,
            "batch": options.batch,
            "runs": options.runs,
            "repeats": options.repeats,
            "settings": [
                f"calibration.size={options.calib_size}",
                f"validation.retrieval={options.pictures}",
                f"validation.images={max(1, min(16, options.pictures))}",
                f"validation.entries={options.eval_size}",
                *options.set,
            ],
        }

    def prepare(self) -> dict[str, Any]:
        """The shared folder, once. Raises SystemExit with what went wrong: without it there is nothing to compare."""
        self.shared.mkdir(parents=True, exist_ok=True)
        kept = self.shared / "prepared.json"
        if kept.exists():
            document: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            if _without_times(document["judge"]) != _without_times(self.judge):
                raise SystemExit(f"{self.folder} holds a comparison with other options: name another folder with -o")
            return dict(document["about"])
        answer, failure = self._ask("prepare", self.shared, self.judge)
        if answer is None:
            raise SystemExit(f"the float model cannot be prepared: {failure}")
        _write(kept, json.dumps({"judge": self.judge, "about": answer}, indent=1) + "\n")
        return answer

    def row(self, entry: Entry) -> dict[str, Any]:
        """Quantize and judge one entry; what is finished is read from its folder."""
        folder = self.folder / entry.key
        kept = folder / "row.json"
        if kept.exists():
            row: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            return {**row, "name": entry.name}
        if not (folder / _RESULT).exists():  # else it was stopped while it was judged
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        row = self._quantized(entry, folder)
        _write(kept, json.dumps(row, indent=1) + "\n")
        return row

    def time(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add latencies to the rows that have an artefact, all measured in one process, and keep them."""
        wanted = [row for row in rows if row.get("artefact") and not row.get("failure")]
        if not self.options.time_again:
            wanted = [row for row in wanted if "latency" not in row]
        timed = [{name: row[name] for name in ("key", "runtime", "artefact")} for row in wanted]
        if not timed:
            return
        answer, failure = self._ask("time", self.shared, {**self.judge, "timed": timed})
        if answer is None:
            raise SystemExit(f"latencies cannot be measured: {failure}")
        for row in wanted:
            row["latency"] = answer[row["key"]]
            _write(self.folder / row["key"] / "row.json", json.dumps(row, indent=1) + "\n")

    def _quantized(self, entry: Entry, folder: Path) -> dict[str, Any]:
        about = {"key": entry.key, "name": entry.name, "bits": entry.bits, "peer": entry.peer}
        job = folder / "job.json"
        given = {"shared": str(self.shared), "output": str(folder), "bits": entry.bits, "setting": entry.setting}
        job.write_text(json.dumps({**given, "judge": self.judge}), encoding="utf-8")
        python = self.pythons.get(entry.peer, sys.executable)
        script, *arguments = entry.script
        result, failure = folder / _RESULT, None
        if not result.exists():
            failure = self._run([python, str(HERE / script), str(job), *arguments], folder / "log.txt")
        if not result.exists():
            return {**about, "failure": failure or "left no result"}
        found = {**about, **json.loads(result.read_text(encoding="utf-8"))}
        if found.get("failure") or found["artefact"] is None:
            return found
        found["bytes"] = _size(Path(found["artefact"]))
        answer, failure = self._ask("judge", folder, {**self.judge, **found})
        return {**found, "metrics": answer} if failure is None else {**found, "failure": f"judging: {failure}"}

    def _ask(self, verb: str, folder: Path, job: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
        """(answer, None) of `peer_judge.py`, or (None, what went wrong)."""
        question, answer = folder / f"{verb}.json", folder / "answer.json"
        question.write_text(json.dumps(job), encoding="utf-8")
        answer.unlink(missing_ok=True)
        python = self.pythons.get("dmqexport", sys.executable)
        failure = self._run([python, str(HERE / "peer_judge.py"), verb, str(question)], folder / f"{verb}.txt")
        if failure is not None or not answer.exists():
            return None, failure or "left no answer"
        return json.loads(answer.read_text(encoding="utf-8")), None

    def _run(self, command: Sequence[str], log: Path) -> str | None:
        """None when it ended well, else how it ended, with the last line that it wrote."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
        environment |= {"OMP_NUM_THREADS": str(self.options.threads), "PYTHONWARNINGS": "ignore"}
        try:
            with log.open("w", encoding="utf-8") as stream:
                done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=log.parent)
        except OSError as error:
            return f"{command[0]} cannot be started: {error.strerror}"
        code = done.returncode
        if code == 0:
            return None
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        last = (lines[-1] if lines else "it said nothing").replace(str(self.folder), "…")
        return f"killed by signal {-code}" if code < 0 else f"ended with {code}: {last[:200]}"


def _without_times(judge: Mapping[str, Any]) -> dict[str, Any]:
    """What everything but latencies depends on."""
    return {key: value for key, value in judge.items() if key not in ("batch", "runs", "repeats")}


def _size(artefact: Path) -> int:
    """Bytes of the graph and of the weights that lie beside it; of a bundle, what its denoiser is loaded from."""
    if artefact.is_dir():
        found = sorted(artefact.glob("*/engines/openvino-*/model.*")) or sorted(artefact.glob("*/model.onnx*"))
    elif artefact.suffix == ".xml":
        found = [artefact, artefact.with_suffix(".bin")]
    else:
        found = [path for path in artefact.parent.glob(artefact.name + "*") if path.is_file()]
    return sum(path.stat().st_size for path in found)


def _document(
    about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], options: argparse.Namespace
) -> dict[str, Any]:
    """What `peers.json` holds: figures, versions and the kind of machine; no paths and no dates."""
    versions: dict[str, str] = {}
    kept = []
    for row in rows:
        versions |= row.get("versions", {})
        own = {key: value for key, value in row.items() if key not in ("artefact", "versions", "peer")}
        kept.append(_rounded(own))
    for unsaid in ("dmqexport", "sympy"):
        versions.pop(unsaid, None)
    return {
        "model": _rounded(about),
        "machine": machine(),
        "batch": options.batch,
        "versions": dict(sorted(versions.items())),
        "rows": kept,
    }


def _rounded(value: Any) -> Any:
    """Four digits: what is measured has no more, and files in a repository should be readable."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description="dmqexport beside other quantizers, on one model and one machine.")
    found.add_argument("-o", "--output", type=Path, default=Path("out/peers"), help="folder of artefacts and tables")
    found.add_argument("-m", "--model", default="emoji", help="model to quantize (default: emoji)")
    found.add_argument("--only", nargs="+", metavar="KEY", help="rows whose key starts so (default: all)")
    found.add_argument("--python", action="append", default=[], metavar="PEER=PATH", help="a peer's Python; repeatable")
    found.add_argument("--work", type=Path, help="work folder of builds, shared with others (default: in OUTPUT)")
    found.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="recipe key of model and samples"
    )
    found.add_argument("--calib-size", type=int, default=256, help="calibration trajectories (default: 256)")
    found.add_argument("--eval-size", type=int, default=400, help="held-out trajectory points (default: 400)")
    found.add_argument(
        "--pictures", type=int, default=100, help="pictures drawn by every method (default: 100; 0: none)"
    )
    found.add_argument("--batch", type=int, default=8, help="batch of the latencies (default: 8)")
    found.add_argument("--runs", type=int, default=15, help="timed runs a round, beside float32 (default: 15)")
    found.add_argument("--repeats", type=int, default=9, help="rounds over all rows; the median counts (default: 9)")
    found.add_argument("--threads", type=int, default=1, help="while quantizing and judging (default: 1)")
    found.add_argument("--time-again", action="store_true", help="measure latencies anew, keep everything else")
    found.add_argument("--no-times", action="store_true", help="measure no latencies now")
    found.add_argument("--store", action="store_true", help=f"also write {STORED.name} beside this script")
    found.add_argument(
        "--update", type=Path, metavar="README", help="put the table in there; without --store, only that"
    )
    return found


def main() -> None:
    """Run what is missing, write `peers.json` and `peers.md`, print the table."""
    options = _parser().parse_args()
    if options.update is not None and not options.store:
        update_readme(options.update, json.loads(STORED.read_text(encoding="utf-8")))
        return
    peers = {entry.peer for entry in ENTRIES}
    unknown = [item for item in options.python if item.partition("=")[0] not in peers or "=" not in item]
    if unknown:
        raise SystemExit(f"--python {unknown[0]}: expected PEER=PATH, with one of {', '.join(sorted(peers))}")
    chosen = [entry for entry in ENTRIES if not options.only or entry.key.startswith(tuple(options.only))]
    comparison = Comparison(options)
    about = comparison.prepare()
    rows = []
    for entry in chosen:
        row = comparison.row(entry)
        rows.append(row)
        print(f"{entry.key}: {row.get('failure') or row['metrics']}", flush=True)
    if not options.no_times:
        comparison.time(rows)
    document = _document(about, rows, options)
    _write(comparison.folder / "peers.json", json.dumps(document, indent=1) + "\n")
    text = markdown(document)
    _write(comparison.folder / "peers.md", text)
    print("\n" + text)
    if options.store:
        stored = json.loads(STORED.read_text(encoding="utf-8"))
        document = merged(document, stored, [entry.key for entry in ENTRIES])
        _write(STORED, json.dumps(document, indent=1) + "\n")
    if options.update is not None:
        update_readme(options.update, document)


if __name__ == "__main__":
    main()
