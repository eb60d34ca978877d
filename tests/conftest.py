"""What tests of the whole share: the bundled model, a text, and a quick artifact of both."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))

import torch

if not torch.cuda.is_available():  # kernels run in Triton's interpreter, if Triton is there
    os.environ["TRITON_INTERPRET"] = "1"

from .timings import machine  # noqa: F401  (a fixture; it imports Triton)

TEXT = """
The harbour of the old town wakes before the sun does. Boats that went out at midnight come back
one after the other, low in the water, and the gulls know it well ahead of the people. By five
o'clock the first boxes stand on the quay, and a man with a ledger walks along them, counting in a
low voice. He has done this for thirty years and he still counts everything twice, once when the
box is set down and once when it is carried away. Nobody asks him why. The numbers have always
agreed at the end of the month, and that is more than can be said of the numbers of the bank.

Inside the market hall the floor is wet and the light is green. Buyers from the city arrive in
small vans and pretend not to look at each other. A good price depends on the weather, on the day
of the week, and on whether the cook of the large hotel has slept well. When the cook is tired he
buys what he bought yesterday; when he is rested he argues, and then everyone has to argue. In the
year of the great storm, when the boats stayed in for eleven days, he bought nothing but potatoes
and wrote a menu in which every dish was named after an island.

By nine it is over. The hall is washed down with sea water, the doors are closed, and the town,
which has slept through all of it, comes down the hill to drink coffee and to ask what the catch
was like. The man with the ledger tells them, to the kilogram, and they nod as if they had known.
"""

QUICK = """
calibration: {sequences: 3, length: 64}
search: {measurements: 2, sequences: 1}
rules:
- rungs:
  - {method: rtn, bits: 2, group_size: 32, scale_bits: 6, clip: false}
  - {method: rtn, bits: 4, clip: false}
  - {method: rtn, bits: 8, clip: false}
"""


@pytest.fixture(scope="session")
def smol() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory."""
    from pliant.model import open_checkpoint

    return open_checkpoint("smollm2").directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few paragraphs, about 350 tokens."""
    path = tmp_path_factory.mktemp("text") / "harbour.txt"
    path.write_text(TEXT.strip() + "\n")
    return path


@pytest.fixture(scope="session")
def quick_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain rounding at 2, 4 and 8 bits, hardly observed and hardly measured."""
    path = tmp_path_factory.mktemp("recipe") / "quick.yaml"
    path.write_text(QUICK)
    return path


@pytest.fixture(scope="session")
def artifact(
    smol: Path, text_file: Path, quick_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The bundled model in 128 MiB, by the quick recipe. Read it only."""
    import torch

    import pliant

    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    out = tmp_path_factory.mktemp("quick") / "smollm2"
    pliant.fit("smollm2", "128MiB", out, text=text_file, recipe=quick_recipe)
    torch.set_num_threads(before)
    return out


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama's checkpoint."""
    from tests.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import save_recipe

    return save_recipe(tmp_path_factory.mktemp("tiny") / "recipe.yaml")


@pytest.fixture(scope="session")
def tiny_artifact(
    tiny_model: Path, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model, fitted from text that it wrote itself. Read it only."""
    import pliant
    from tests.tiny import CONTEXT, memory

    out = tmp_path_factory.mktemp("tiny") / "artifact"
    pliant.fit(tiny_model, memory(tiny_model), out, context=CONTEXT, recipe=tiny_recipe)
    return out
