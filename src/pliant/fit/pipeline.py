"""`fit`: a checkpoint and a budget become an artifact that holds every size."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from pliant.budget import Budget, format_size, parse_size
from pliant.errors import BudgetError, PliantError, UnsupportedModelError
from pliant.fit.background import Background, ahead
from pliant.fit.build import Built, begin, build_rungs, estimate_nbytes, proposals
from pliant.fit.cache import measure_cache
from pliant.fit.calibrate import Pool, calibration_text, read_pool
from pliant.fit.device import held_bytes, resident_bytes
from pliant.fit.evaluate import Evaluator
from pliant.fit.evolving import evolve_sizes, evolved_summary
from pliant.fit.planning import better_ladder, distinct, make_ladder, measure_samples
from pliant.fit.recipe import (
    KEEP,
    Recipe,
    Rule,
    RungSpec,
    Search,
    default_recipe,
    read_recipe,
)
from pliant.fit.result import FitResult, summary
from pliant.fit.scratch import put_aside, store, take_back
from pliant.fit.training import reconstructed_rungs, trained_rungs, training_text
from pliant.fit.tune import trained_sizes
from pliant.ladder import Ladder, Rung, Writer, check_output, load
from pliant.ladder.live import check_shape
from pliant.ladder.output import told_when_full
from pliant.model import StreamedModel, Target, find_device, open_checkpoint
from pliant.model.heap import release
from pliant.observe import (
    Observation,
    Statistics,
    Sweep,
    digest,
)
from pliant.plan.memory import Breakdown, activation_bytes, kv_cache_bytes, weights_budget
from pliant.plan.search import Correction, Sample, spaced

Progress = Callable[[str, int, int], None]  # stage, done, of

_COMPARED = 6  # sizes at which two orders of a trained ladder are measured
_CACHE_WINDOWS = 2  # of the text, on which the KV cache is measured
_COPIED = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template",
           "generation_config", "config.json", "LICENSE")  # fmt: skip


def fit(
    source: str | Path,
    memory: int | str,
    out: str | Path | None = None,
    *,
    context: int = 2048,
    batch: int = 1,
    text: str | Path | None = None,
    recipe: Recipe | str | Path | None = None,
    effort: str = "balanced",
    device: str = "auto",
    seed: int = 0,
    dry_run: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> FitResult:
    """Squeeze the model `source` into `memory` bytes and write the artifact `out`.

    source: a Hugging Face directory, a hub id, a .gguf file, or "smollm2". memory: everything
    that the running model holds at `context` tokens and `batch` sequences. text: calibration
    text, a file or data set; without it the model writes its own from `seed`. effort: quick,
    balanced or best. device: where it computes; "auto" is a GPU when there is one. An interrupted
    run goes on when it is called again with the same arguments. Raises PliantError and its kinds.
    """
    budget = Budget(parse_size(memory), context, batch)
    if out is None and not dry_run:
        raise PliantError("fit needs an output directory (out=..., on the command line -o DIR)")
    if out is not None and not dry_run:
        check_output(out, overwrite)
    report = progress or (lambda stage, done, of: None)
    checkpoint = open_checkpoint(
        source,
        trust_remote_code=trust_remote_code,
        progress=lambda what, d, of: report(what, d, of),
    )
    place = find_device(device)
    base = default_recipe(
        effort, text=None if text is None else str(text), seed=seed, gpu=place.type == "cuda"
    )
    if isinstance(recipe, Recipe):
        base = recipe
    elif recipe is not None:
        base = read_recipe(recipe, base)
    if text is not None:
        settings = base.calibration.model_copy(update={"text": str(text)})
        base = base.model_copy(update={"calibration": settings})
    check_shape(checkpoint.config, context, batch)
    room = weights_budget(checkpoint.config, budget)
    note = ""
    widened = checkpoint.nbytes * 4 // checkpoint.dtype.itemsize
    # Beside the model's start: tokens are cut outside of Python, on a core of their own.
    tokenizer = None if dry_run or base.calibration.text is None else checkpoint.tokenizer()
    pool = None if dry_run else ahead(partial(read_pool, base, tokenizer))
    model = StreamedModel(checkpoint, resident=widened <= resident_bytes(place), device=place)
    fixed = sum(tensor.nbytes for tensor in _fixed(model).values())
    original = fixed + _numbers(model.targets) * checkpoint.dtype.itemsize
    if room >= original:
        note = (
            f"the original fits: its weights take {format_size(original)} and "
            f"{format_size(room)} are there for them, so it is kept as it is"
        )
        base = base.model_copy(update={"rules": (Rule(rungs=(RungSpec(method=KEEP),)),)})
    job = _Job(model, base, report, fixed)
    job.check(budget, room)
    if dry_run:
        return job.preview(budget, room, note)
    assert out is not None
    assert pool is not None
    return job.run(Path(out), budget, room, overwrite, note, pool)


class _Job:
    """The stages of one fit, in order."""

    def __init__(self, model: StreamedModel, recipe: Recipe, report: Progress, fixed: int) -> None:
        self.model = model
        self.recipe = recipe
        self.report = report
        for rule in recipe.rules:
            for spec in rule.rungs:
                spec.check()
        self.specs = {t.name: recipe.rungs(t) for t in model.targets}
        self.fixed = fixed

    # What can be known before any work

    def _estimates(self) -> dict[str, list[int]]:
        size = self.model.checkpoint.dtype.itemsize
        return {
            t.name: sorted(estimate_nbytes(t, s, size) for s in self.specs[t.name])
            for t in self.model.targets
        }

    def check(self, budget: Budget, room: int) -> None:
        """Refuse at once a budget below the smallest size that the recipe allows."""
        self._refuse_below(
            self.fixed + sum(sizes[0] for sizes in self._estimates().values()), budget, room
        )

    def _refuse_below(self, smallest: int, budget: Budget, room: int) -> None:
        if smallest > room:
            least = budget.memory - room + smallest
            raise BudgetError(
                f"{format_size(budget.memory)} is below the smallest size: with a context of "
                f"{budget.context} and a batch of {budget.batch} this model takes at least "
                f"{format_size(least)} ({least} bytes), {format_size(smallest)} of it weights; "
                "raise --memory, or lower --context or --batch"
            )

    def preview(self, budget: Budget, room: int, note: str) -> FitResult:
        """What a run would give, by estimate; nothing is read or written."""
        estimates = self._estimates()
        low = self.fixed + sum(sizes[0] for sizes in estimates.values())
        high = self.fixed + sum(sizes[-1] for sizes in estimates.values())
        used = min(room, high)
        config = self.model.config
        outer = [t for t in self.model.targets if t.block is None]
        numbers = _numbers(self.model.targets)
        share = _numbers(outer) / numbers
        embeddings = int((used - self.fixed) * share)
        cache = kv_cache_bytes(config, budget.context, budget.batch)
        activations = activation_bytes(config, budget.context, budget.batch)
        breakdown = Breakdown(
            used - embeddings, embeddings, cache, activations,
            budget.memory - used - cache - activations,
        )  # fmt: skip
        return FitResult(
            None, budget.memory, breakdown.total, breakdown, None, 8 * used / numbers,
            len(estimates), sum(map(len, estimates.values())), low, high,
            self.model.checkpoint.nbytes, note,
        )  # fmt: skip

    # The work

    def run(
        self, out: Path, budget: Budget, room: int, overwrite: bool, note: str, read: Future[Pool]
    ) -> FitResult:
        calibrated = any(len(specs) > 1 or specs[0].needs() for specs in self.specs.values())
        pool = read.result() if calibrated else Pool()
        writer = Writer(out, self._key(pool), overwrite, held_bytes(self.model.device))
        work = writer.directory / "work"
        work.mkdir(exist_ok=True)
        if not writer.has("fixed"):
            writer.write_fixed(_fixed(self.model))
        ids, weights = torch.zeros(0, 2, dtype=torch.long), None
        search = self.recipe.search
        wanted = search.sequences if search.measurements or search.generations else 0
        if calibrated:
            ids, weights = self._calibration(work, pool, wanted)
        split = min(wanted, len(ids) // 3)  # a short text is for calibration first
        held_out, ids = ids[:split], ids[split:]
        self._build(writer, work, ids, None if weights is None else weights[split:])
        rungs = distinct(writer.all_rungs(*self._shards()))
        if self.recipe.reconstruct.method and len(ids):
            rungs = reconstructed_rungs(
                writer, self.model, rungs, ids, self.recipe.reconstruct, self.report
            )
        if self.recipe.tune.steps and len(ids):
            ladder, correction, samples = self._trained(writer, rungs, ids, held_out, work)
        else:
            ladder, correction, samples = self._plan(writer, rungs, ids, held_out, search)
        self._refuse_below(ladder.smallest_bytes, budget, room)  # some sizes were estimates
        self.report("writing", 0, 1)
        path = writer.finish(
            ladder,
            files=self._files(),
            targets=[dataclasses.asdict(t) for t in self.model.targets],
            budget={"memory": budget.memory, "context": budget.context, "batch": budget.batch},
            recipe=self.recipe.as_dict(),
            provenance={
                "source": self.model.checkpoint.directory.name,
                "model": self.model.checkpoint.fingerprint(),
                "original_bytes": self.model.checkpoint.nbytes,
                "calibration": {
                    "sequences": len(ids),
                    "digest": digest(ids),
                    "select": self.recipe.calibration.select,
                },
                "correction": dataclasses.asdict(correction),
                "samples": len(samples),
                "evolved": evolved_summary(writer),
            },
            complete=partial(self._measure_cache, ids=held_out if len(held_out) else ids),
        )
        self.report("writing", 1, 1)
        return summary(path, note)

    def _measure_cache(self, path: Path, ids: Tensor) -> None:
        """Measure what the written model's KV cache costs in fewer bits; the fit stands without."""
        ids = ids[:_CACHE_WINDOWS].to(self.model.device)
        if not len(ids):
            return
        model = load(path, device=self.model.device)
        with suppress(UnsupportedModelError):
            measure_cache(
                model, ids, str(self.recipe.calibration.text or "written by the model"),
                progress=lambda d, of: self.report("measuring the cache", d, of),
            )  # fmt: skip

    def _trained(
        self,
        writer: Writer,
        rungs: dict[str, list[Rung]],
        ids: Tensor,
        held_out: Tensor,
        work: Path,
    ) -> tuple[Ladder, Correction, list[Sample]]:
        """The climb over rungs that are trained along a rough one first."""
        search = self.recipe.search
        rough = Search(measurements=search.measurements // 3)
        ladder, _, _ = self._plan(writer, rungs, ids, held_out, rough)
        own = ids if self.recipe.calibration.text is not None else ids[:0]
        text = training_text(self._resident(), self.recipe, own, work, self.report)
        trained = trained_rungs(writer, self.model, ladder, text, self.recipe, work, self.report)
        sizes = sorted(set(spaced(*trained_sizes(ladder, self.recipe.tune), _COMPARED)))
        along = [ladder.allocation(size) for size in sizes]
        ladder, correction, samples = self._plan(
            writer, trained, ids, held_out, search, "trained"
        )  # fmt: skip
        if len(held_out):  # rungs may fit each other best where they were trained together
            kept, _ = make_ladder(trained, self.model.targets, samples, writer.fixed_bytes, along)
            ladder = better_ladder(
                writer, lambda: Evaluator(self.model, held_out), [ladder, kept], sizes,
                name="orders", progress=lambda d, of: self.report("comparing", d, of),
            )  # fmt: skip
        return ladder, correction, samples

    def _plan(
        self,
        writer: Writer,
        rungs: dict[str, list[Rung]],
        ids: Tensor,
        held_out: Tensor,
        search: Search,
        name: str = "samples",
    ) -> tuple[Ladder, Correction, list[Sample]]:
        """The climb over `rungs`, after a few whole models were measured, and sizes evolved."""
        samples = measure_samples(
            writer, lambda: Evaluator(self.model, held_out), rungs, self.model.targets,
            search.measurements if len(held_out) else 0,
            seed=self.recipe.seed, name=name,
            progress=lambda d, of: self.report("measuring", d, of),
        )  # fmt: skip
        through = evolve_sizes(
            writer, self.model, ids, held_out, rungs, samples, search,
            seed=self.recipe.seed, progress=lambda d, of: self.report("evolving", d, of),
        )  # fmt: skip
        ladder, correction = make_ladder(
            rungs, self.model.targets, samples, writer.fixed_bytes, through
        )
        return ladder, correction, samples

    def _key(self, pool: Pool) -> str:
        """What decides the rungs and their order; the budget does not."""
        parts = {
            "version": version("pliant"),
            "model": self.model.checkpoint.fingerprint(),
            "recipe": self.recipe.as_dict(),
            "text": pool.digest(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _calibration(self, work: Path, pool: Pool, held_out: int) -> tuple[Tensor, Tensor | None]:
        """Sequences [n, T], the first `held_out` to measure on, and their weights [n]."""
        return calibration_text(
            self.model, self.recipe, pool, work, self._resident, held_out=held_out,
            report=self.report,
        )  # fmt: skip

    def _resident(self) -> StreamedModel:
        """A model whose layers all stay in memory, if that can be."""
        on_gpu = self.model.device.type == "cuda"
        if self.model.resident and not on_gpu:
            return self.model
        checkpoint = self.model.checkpoint
        if not on_gpu and 2 * checkpoint.nbytes > psutil.virtual_memory().available:
            return self.model
        return StreamedModel(
            checkpoint, dtype=torch.bfloat16, resident=True, device=self.model.device
        )

    def _shards(self) -> list[str]:
        """Names of the shards for rungs: one a layer, and one for what is outside the layers."""
        outer = any(target.block is None for target in self.model.targets)
        layers = [f"block-{index:05d}" for index in range(len(self.model.blocks))]
        return [*layers, *(["outer"] if outer else [])]

    def _build(
        self, writer: Writer, work: Path, ids: Tensor, weights: Tensor | None = None
    ) -> None:
        """Every shard of rungs, from the last layer to the first."""
        blocks = len(self.model.blocks)
        outer = [t for t in self.model.targets if t.block is None]
        names = self._shards()
        shards = names[:blocks]
        if all(writer.has(name) for name in names):
            return
        if not len(ids):
            for index, name in enumerate(names):
                block = index if index < blocks else None
                seen = [_unseen(t) for t in self.model.targets if t.block == block]
                writer.write(name, proposals(self._rungs(seen)))
                self.report("storing", index + 1, len(names))
            return
        sweep = Sweep(
            self.model, ids, work, needs=self._needs(), weighted=self.recipe.weighted,
            seed=self.recipe.seed, weights=weights,
        )  # fmt: skip
        if not sweep.forwarded():
            with told_when_full(work, sweep.scratch_bytes):
                sweep.forward(lambda d, of: self.report("reading text", d, of))
        total = len(self.model.targets)
        done = sum(len({r.target for r in writer.rungs(n)}) for n in names if writer.has(n))
        self.report("building rungs", done, total)
        start, gradient = self._gradient(writer, work, shards)
        heads: list[Observation] = []
        if gradient is None or (outer and not writer.has("outer")):
            heads, top = sweep.outer()
            if gradient is None:
                gradient = top
            heads = [put_aside(work, o) for o in heads]  # not needed until the layers are done
            release()
        with Background(self.model.device) as writing:
            for index in range(start - 1, -1, -1):
                built: list[Built] | None = None
                fresh = not writer.has(shards[index])
                seen, gradient = sweep.block(index, gradient, observe=fresh)
                if fresh:
                    count = len(seen)
                    built = self._rungs(seen, done, check=writing.check)
                    done += count
                writing.run(partial(self._keep, writer, work, index, built, gradient))
        if not writer.has("outer") and outer:
            sweep.look_ups(heads, gradient)
            writer.write("outer", proposals(self._rungs(heads, done, work)))
        sweep.forget()

    def _keep(
        self,
        writer: Writer,
        work: Path,
        index: int,
        built: list[Built] | None,
        gradient: Tensor,
    ) -> None:
        """Write layer `index`'s rungs, if they are not yet, and then the gradient at its input.

        In this order, layer after layer: a resumed run goes on below the gradient that it finds.
        """
        if built is not None:
            writer.write(self._shards()[index], proposals(built))
            built.clear()
        release()
        self._save_gradient(work, index, gradient)

    def _rungs(
        self,
        seen: list[Observation],
        done: int | None = None,
        aside: Path | None = None,
        check: Callable[[], None] | None = None,
    ) -> list[Built]:
        """The rungs of what was observed. check: called after each target."""
        built: list[Built] = []
        # The widest first: its moments are the largest, and no codes are held yet. Statistics go
        # as soon as the rungs are made.
        seen.sort(key=lambda observation: -observation.target.shape[1])
        while seen:
            observation = seen.pop(0)
            if aside is not None:
                observation = take_back(aside, observation, self.model.device)
            if seen and aside is None and self.model.device.type == "cuda":
                begin(seen[0], self.specs[seen[0].target.name])
            built += build_rungs(self.model, observation, self.specs[observation.target.name])
            if done is not None:
                done += 1
                self.report("building rungs", done, len(self.model.targets))
            if check is not None:
                check()
        return built

    def _needs(self) -> Mapping[str, frozenset[str]]:
        return {n: frozenset().union(*(s.needs() for s in own)) for n, own in self.specs.items()}

    def _gradient(
        self, writer: Writer, work: Path, shards: Sequence[str]
    ) -> tuple[int, Tensor | None]:
        """The lowest layer whose input's gradient is on disk, and that gradient.

        None, and the pass begins at the top, where a shard above is missing: it was damaged.
        """
        for index in range(len(shards)):
            path = work / f"gradient-{index:05d}.safetensors"
            if path.exists() and all(map(writer.has, shards[index:])):
                return index, load_file(path, device=str(self.model.device))["gradient"]
        return len(shards), None

    def _save_gradient(self, work: Path, index: int, gradient: Tensor) -> None:
        path = work / f"gradient-{index:05d}.safetensors"
        store(path, {"gradient": gradient})
        for older in work.glob("gradient-*.safetensors"):
            if older != path:
                older.unlink()

    def _files(self) -> dict[str, Path | bytes | str]:
        trusted = self.model.checkpoint.trust_remote_code
        files: dict[str, Path | bytes | str] = {
            path.name: path
            for path in sorted(self.model.checkpoint.directory.iterdir())
            if path.is_file()
            and (path.name.startswith(_COPIED) or (trusted and path.suffix == ".py"))
        }
        return {**files, "recipe.yaml": self.recipe.to_yaml()}


def _fixed(model: StreamedModel) -> dict[str, Tensor]:
    """What every size holds, in 32 bits: how it is computed with, so that its bytes are planned."""
    return {n: t.float() if t.is_floating_point() else t for n, t in model.others()}


def _numbers(targets: Sequence[Target]) -> int:
    return sum(target.shape[0] * target.shape[1] for target in targets)


def _unseen(target: Target) -> Observation:
    return Observation(target, Statistics())
