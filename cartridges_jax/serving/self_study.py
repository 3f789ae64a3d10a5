"""Self-study in processes of its own: `python -m synth` asks a server of ours about a document."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cartridges_jax.serving.server_process import server_process

DATASET = "dataset.parquet"


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """The server that self-study asks."""

    max_num_seqs: int = 48
    max_length: int = 544
    dtype: str = "float32"


@contextlib.contextmanager
def self_study_server(model: str, config: ServerConfig, directory: Path) -> Iterator[str]:
    """Runs a server of the model, whose log goes to `server.log` of the directory, and yields its URL."""
    flags = ["--port=0", "--max-queue=4096", f"--model={model}", f"--dtype={config.dtype}"]
    flags += [f"--max-num-seqs={config.max_num_seqs}", f"--max-length={config.max_length}"]
    with server_process([*flags, f"--cartridges={directory}"], directory / "server.log") as url:
        yield url


def synthesize(config_path: str, overrides: Sequence[str], document: Path, url: str, folder: Path) -> None:
    """Makes the dataset of a document in the folder, with the settings of a config file's stage `synth`.

    Args:
      overrides: flags of the command whose config it is, of which those for `config.synth` are passed on.

    Raises: ChildProcessError, if it stops early; the same call goes on from there.
    """
    command = [sys.executable, "-m", "synth", f"--config={config_path}:synth"]
    command += [o.replace("--config.synth.", "--config.") for o in overrides if o.startswith("--config.synth.")]
    command += [
        f"--config.output_dir={folder}",
        f"--config.resource.path={document}",
        f"--config.client.base_url={url}",
    ]
    if subprocess.run(command, check=False).returncode:
        log = folder.parent / "server.log"
        raise ChildProcessError(f"synthesis stopped early, see above; the server's log is {log}")
