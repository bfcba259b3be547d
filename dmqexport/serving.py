"""A served bundle as a drop-in component of diffusers pipelines.

    dmqexport package out/emoji --format triton -o models --name emoji
    tritonserver --model-repository models

    pipe.unet = RemoteDenoiser("localhost:8000", "emoji", "models/emoji")

Text encoder, scheduler and decoder run where the pipeline does; the denoiser's steps are requests. Any server of the
KServe v2 protocol will do, and requests of many pipelines, each at its own timestep, share the server's batches.
"""

from pathlib import Path
from typing import Any

from dmqexport.bundle import MANIFEST, open_bundle, read_json
from dmqexport.errors import BundleError, EngineError
from dmqexport.models.family import family_of
from dmqexport.package import DESCRIPTION, DESCRIPTION_SCHEMA, describe
from dmqexport.runtime import QuantizedDenoiser
from engines.remote import Patience, Protocol, RemoteRunner


class RemoteDenoiser(QuantizedDenoiser):
    """Calls a served denoiser with the signature of the diffusers one; may be called from several threads at once."""

    def __init__(
        self,
        url: str,
        model: str,
        description: str | Path,
        protocol: str = "http",
        *,
        version: str = "",
        timeout_s: float = 60.0,
        reconnect_s: float = 30.0,
    ) -> None:
        """url: host:port; description: the packaged model's folder, its denoiser.json, or the bundle.

        protocol: http or grpc; version "": the server's choice; timeout_s: wait for one answer; reconnect_s: wait for
        a server that went away, during which the request is sent again. Raises BundleError when the description is
        broken or the served graph is another's, EngineError when the server or model is not there, BackendMissingError
        without tritonclient.
        """
        if protocol not in list(Protocol):
            raise EngineError(f"protocol {protocol!r} is not known", hint=f"known: {', '.join(Protocol)}")
        path = Path(description)
        facts = _facts(path)
        config, size = dict(facts["config"]), facts["latent_size"]
        family = family_of(str(facts["family"]), config, tuple(size) if size else None)
        runner = RemoteRunner(
            url, model, Protocol(protocol), version=version, patience=Patience(timeout_s, reconnect_s)
        )
        if set(runner.input_names) != set(family.input_names):
            raise BundleError(
                f"{model} on {url} takes {sorted(runner.input_names)}, a denoiser described by {path} takes "
                f"{sorted(family.input_names)}",
                hint="name the model that was packaged with this description",
            )
        super().__init__(runner, family, config, int(facts["num_timesteps"]))


def _facts(path: Path) -> dict[str, Any]:
    """What `dmqexport.package.describe` says of the denoiser, wherever it is written; raises BundleError."""
    if (path / MANIFEST).is_file():
        return describe(open_bundle(path))
    file = path / DESCRIPTION if path.is_dir() else path
    if not file.is_file():
        raise BundleError(
            f"{path} describes no denoiser: there is no {DESCRIPTION}",
            hint="pass the model's folder in the repository that `dmqexport package` wrote, or the bundle",
        )
    facts = read_json(file)
    if facts.get("schema_version") != DESCRIPTION_SCHEMA:
        raise BundleError(
            f"{file}: schema {facts.get('schema_version')}, this version reads {DESCRIPTION_SCHEMA}",
            hint="package the bundle again",
        )
    missing = [name for name in ("family", "config", "num_timesteps", "latent_size") if name not in facts]
    if missing:
        raise BundleError(f"{file} lacks {', '.join(missing)}", hint="package the bundle again")
    return facts
