"""Saves a run while it goes on, so that one that was stopped, crashed or lost its power goes on from there.

A checkpoint is one safetensors file: the latents, what the solver remembers, and as JSON in the metadata the settings
that decide the result. It is named by a digest of these, so runs of other settings never meet, and it is replaced as a
whole, so at every moment there is the old file or the new one. From the same step the same bits follow on the same
device: where blocks live does not matter for them, the size of chunks does and is kept with the run.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .cache import CacheRun
from .memory.recovery import is_out_of_memory
from .models import Model, Part
from .sampling import SOLVERS, Conditions, Guidance, Progress, Schedule
from .weights import human_size
from .weights.lora import Lora
from .weights.save import replacing

log = logging.getLogger(__name__)

# Names in the metadata: of what a checkpoint says of its run, and of the digest of all that it holds.
KEY, DIGEST = "wan_core", "digest"
FORMAT = "checkpoint 1"
# What the names of a cache's tensors begin with.
CACHED = "cache."
# The name of what guidance remembers.
AVERAGE = "guidance.average"

# Seconds after which a temporary file is one that was left behind, whichever run wrote it.
ABANDONED = 24 * 3600


@dataclass(frozen=True)
class Checkpoints:
    """Save a run in `folder` after each `every` steps, and go on from what an equal run has saved there.

    `resume` is the file of one run that is to go on, wherever it lies; it is only read. Of other runs the latest `keep`
    files stay, all for None. Raises ValueError for an interval below 1, and where there is no such file.
    """

    folder: str | Path
    every: int = 1
    resume: str | Path | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"checkpoints are wanted every {self.every} steps; expected 1 or more.")
        if self.resume is not None and not Path(self.resume).is_file():
            raise ValueError(f"there is no checkpoint {self.resume}. Check the path; the file is removed when its run "
                             "has ended well.")


class SavedRun:
    """The checkpoint of one run, told from others by its `settings` (see `settings_of`). `seed` is the solver's, and
    `cache` a state that no step has been taken with.

    Makes the folder and takes away what killed processes left in it. Raises OSError where there can be no folder.
    """

    def __init__(self, checkpoints: Checkpoints, settings: Mapping[str, str], schedule: Schedule, solver: str,
                 seed: int = 0, cache: CacheRun | None = None) -> None:
        self._checkpoints, self._settings, self._schedule = checkpoints, settings, schedule
        self._solver, self._seed, self._cache = solver, seed, cache
        self._saved_at = 0
        folder = Path(checkpoints.folder)
        folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"wan-{digest[:16]}.safetensors"
        self._failed = False
        others = [path for path in folder.glob("wan-*.safetensors") if path != self.path]
        if checkpoints.keep is not None:
            for old in sorted(others, key=_last_change, reverse=True)[checkpoints.keep:]:
                old.unlink(missing_ok=True)
        for left in folder.glob(".wan-*.safetensors.*.tmp"):
            _take_away(left, is_own=left.name.startswith(f".{self.path.name}."))

    def load(self) -> Progress | None:
        """Where the run stands, on the host; None where nothing usable is saved.

        Raises ValueError where `resume` names a file that cannot be read or was saved by a run of other settings.
        """
        asked = self._checkpoints.resume
        path = self.path if asked is None else Path(asked)
        if asked is None and not path.exists():
            return None
        try:
            about, tensors = _read(path)
            if about["settings"] != self._settings:
                raise ValueError(f"{path.name} was saved by a run of other settings. "
                                 f"{_difference(about['settings'], self._settings)} Give the settings of the saved "
                                 "run, or start a new one.")
            progress = self._progress(about, tensors)
        except _Unusable as error:
            if asked is not None:
                raise ValueError(f"{path.name} cannot be resumed: {error}. Start the run again.") from error
            log.warning("%s cannot be resumed, and the run begins anew: %s.", path.name, error)
            return None
        done, steps = progress.index, self._schedule.steps
        self._saved_at = done
        where = f"going on at step {done + 1} of {steps}" if done < steps else "all steps are done"
        log.info("%s: %s", path.name, where)
        return progress

    def save(self, progress: Progress) -> None:
        """Replace the file, if it is time. Where that fails the run goes on, and a warning says so once.

        Between a step and others that reuse what it has computed nothing is saved: it would be gigabytes.
        """
        is_due = progress.index - self._saved_at >= self._checkpoints.every or progress.index == self._schedule.steps
        cached = progress.cache.state_dict() if progress.cache else {}
        if not is_due or cached is None:
            return
        self._saved_at = progress.index
        try:
            tensors = {"latents": progress.latents, **progress.solver.state_dict(),
                       **{f"{CACHED}{name}": tensor for name, tensor in cached.items()},
                       **({} if progress.average is None else {AVERAGE: progress.average})}
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            about = {"format": FORMAT, "settings": self._settings, "solver": self._solver, "steps done": progress.index,
                     "backend": progress.backend, "chunk": progress.chunk, "plain attention": progress.is_plain}
            text = json.dumps(about)
            # Not by save_file, which writes to a temporary file of its own, whose name nobody knows after a kill.
            contents = save(tensors, {KEY: text, DIGEST: _digest_of(tensors, text)})
            with replacing(self.path, f" ({human_size(len(contents))})") as temporary:
                temporary.write_bytes(contents)
        except Exception as error:
            if not isinstance(error, OSError) and not is_out_of_memory(error):
                raise
            if not self._failed:
                log.warning("The run goes on without a new checkpoint: %s", error)
            self._failed = True

    def remove(self) -> None:
        """To be called when the run has ended well."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("The checkpoint %s could not be removed: %s", self.path.name, error)

    def _progress(self, about: Mapping[str, object], tensors: dict[str, Tensor]) -> Progress:
        solver = SOLVERS[self._solver](self._schedule, self._seed)
        try:
            latents = tensors.pop("latents")
            average = tensors.pop(AVERAGE, None)
            cached = {name: tensors.pop(name) for name in list(tensors) if name.startswith(CACHED)}
            solver.load_state_dict(tensors)
            cache = copy(self._cache)
            if cache:
                cache.load_state_dict({name.removeprefix(CACHED): tensor for name, tensor in cached.items()},
                                      about["steps done"])
            return Progress(about["steps done"], latents, solver, about["backend"], about["chunk"], cache, average,
                            about["plain attention"])
        except (KeyError, ValueError) as error:
            raise _Unusable(f"it is damaged ({error})") from error


class _Unusable(Exception):
    """Why a file cannot be gone on from."""


def _read(path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    """What a file says of its run, and its tensors. Raises _Unusable for anything but a whole checkpoint."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            about = json.loads(metadata.get(KEY, "null"))
            # Copies: the file is going to be replaced, which some systems refuse while it is mapped.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (OSError, SafetensorError, ValueError) as error:
        raise _Unusable(f"it cannot be read ({error})") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise _Unusable("it is no checkpoint of this version")
    if metadata.get(DIGEST) != _digest_of(tensors, metadata[KEY]):
        raise _Unusable("its contents are damaged")
    return about, tensors


def settings_of(model: Model, schedule: Schedule, conditions: Conditions, guidance: Guidance, solver: str,
                start: Tensor, named: Mapping[str, object], seed: int = 0) -> dict[str, str]:
    """All that decides the result of a run, as words: of tensors a digest, of files name, size and time of change.

    `start` is the sample that it begins with; `named` are settings that are in the tensors already, for people; `seed`
    is of the noise that a solver adds.
    """
    parts = model.parts
    settings = {name: str(value) for name, value in named.items()}
    seeded = solver in SOLVERS and SOLVERS[solver].draws_noise
    settings |= {"preset": model.preset.name, "expert boundary": str(model.boundary), "attention": model.attention,
                 "solver": f"{solver}, seed {seed}" if seeded else solver,
                 "FP8 products": str(model.multiplies_in_fp8),
                 "guidance": ", ".join(str(guidance.scale_for(expert)) for expert in parts),
                 "noise levels": f"{schedule.steps} steps from {schedule.sigmas[0]:.4f} to {schedule.sigmas[-1]:.4f}, "
                                 f"{_digest_of([schedule.sigmas, schedule.timesteps])}"}
    for expert, part in parts.items():
        name = f"{expert}-noise expert" if model.preset.experts else "model"
        settings |= {f"{name} {what}": text for what, text in _weights(part).items()}
        settings[f"{name} precision"] = str(model.computes_in(part)).removeprefix("torch.")
    for kind, loras in (("merged LoRA", model.folded), ("LoRA", model.loras)):
        settings |= {f"{kind} {index}": _lora(lora, parts) for index, lora in enumerate(loras, 1)}
    if model.attention_ranges:
        settings |= _told("attention ranges", model.attention_ranges)
    if model.radial:
        settings |= _told("radial attention", model.radial)
    if model.compile:
        settings |= _told("compile", model.compile)
    if model.cache:
        settings |= _told("cache", model.cache)
    if model.guidance.record():
        settings |= _told("guidance options", model.guidance)
    return settings | _told("start", start) | _told("conditions", conditions)


def _weights(part: Part) -> dict[str, str]:
    kept = [f"{name} {part.file.dtypes()[name]} {list(shape)} {part.file.quantised.get(name)} {part.file.size(name)}"
            for name, shape in sorted(part.file.shapes().items())]
    digest = hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16]
    files = ", ".join(f"{name} ({size} bytes, changed {changed})" for name, size, changed in part.file.sources)
    return {"files": files, "formats": f"{part.formats}, {digest}"}


def _lora(lora: Lora, experts: Mapping[str, Part]) -> str:
    _, changed, size, blocks = lora.key
    strengths = ", ".join(str(lora.strengths[expert]) for expert in experts)
    return (f"{lora.file.path.name} ({size} bytes, changed {changed}), strength {strengths}, sigma {lora.start} to "
            f"{lora.end}, blocks {blocks!r}")


def _told(name: str, value: object) -> dict[str, str]:
    """What `value`, a dataclass or a part of one, says, with the tensors in it as digests."""
    if isinstance(value, Tensor):
        return {name: f"{value.dtype} {list(value.shape)} {_digest_of([value])}"}
    if is_dataclass(value):
        parts = {f"{name} {field.name}": getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, tuple | list):
        parts = {f"{name} {index}": part for index, part in enumerate(value, 1)}
    else:
        return {name: str(value)}
    told = {name: type(value).__name__}
    for key, part in parts.items():
        told |= _told(key, part)
    return told


def _digest_of(tensors: Mapping[str, Tensor] | Sequence[Tensor], text: str = "") -> str:
    """16 hexadecimal digits of `text` and of the names, if there are any, types, shapes and bytes of tensors."""
    digest = hashlib.sha256(text.encode())
    named = tensors if isinstance(tensors, Mapping) else dict(enumerate(tensors))
    for name in sorted(named):
        tensor = named[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _difference(saved: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    names = [name for name in {**wanted, **saved} if saved.get(name) != wanted.get(name)]
    return " ".join(f"{name}: {saved.get(name, 'none')} there, {wanted.get(name, 'none')} here." for name in names)


def _last_change(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        # Its own run has just ended well.
        return 0.0


def _take_away(left: Path, is_own: bool) -> None:
    """Remove a temporary file that a killed process has left, unless it may belong to a run that is alive."""
    try:
        if is_own or time.time() - left.stat().st_mtime > ABANDONED:
            left.unlink()
    except OSError as error:
        log.warning("The temporary file %s could not be removed: %s", left.name, error)
