"""Where, at which size and beside whom everything is measured, and who takes the results."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks.limits import Machine, Work
from benchmarks.shared import FP8, Report, interleave, random_part
from wan_core.memory import OneAtATime
from wan_core.models import Model
from wan_core.presets import PRESETS, TEXT_ENCODERS, TRANSFORMERS, VAES, TextEncoderSpec, TransformerSpec, VAESpec
from wan_core.weights.fp8 import has_fp8_products

PROMPT_TOKENS = 60


@dataclass(frozen=True)
class Clip:
    """Latents [B, C, T, H, W] of a video, how often a step on them is timed, and the goals for it by form of weights,
    "float32", "bfloat16" or "fp8" (see `Report.compare`)."""

    name: str
    shape: tuple[int, ...]
    rounds: int
    goals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """The sizes of everything; `passes` through the transformer are what is called a step, and `numbers` is how many
    random ones there are (see `random_part`). `probe` are the sizes with which rates are measured, see `Machine`."""

    name: str
    spec: TransformerSpec
    forms: tuple[str, ...]
    clips: tuple[Clip, ...]
    passes: int
    vaes: Mapping[str, VAESpec]
    vae_dtype: torch.dtype
    video: tuple[int, int, int]
    vae_goals: Mapping[str, Mapping[str, float]]
    text: TextEncoderSpec
    loaded: TransformerSpec
    cached: TransformerSpec
    cached_shape: tuple[int, ...]
    cached_steps: int
    numbers: int
    probe: tuple[int, int, int] = (2048, 96, 1 << 29)
    long_clip: int = 129


_FOUR_LAYERS = TransformerSpec(model_type="t2v", dim=1536, ffn_dim=8960, num_heads=12, num_layers=4)
_NARROW = TransformerSpec(model_type="t2v", dim=256, ffn_dim=512, num_heads=2, num_layers=2)

SCALES = {
    # All of it in seconds, to see that it runs.
    "tiny": Scale(
        "tiny", _NARROW, ("float32", "bfloat16"), (Clip("32 tokens", (1, 16, 2, 8, 8), 1),), 1,
        {"wan21_vae": replace(VAES["wan21_vae"], dim=8, decoder_dim=8),
         "wan22_vae": replace(VAES["wan22_vae"], dim=8, decoder_dim=16)}, torch.float32, (5, 32, 32), {},
        TEXT_ENCODERS["nano_umt5"], _NARROW, _NARROW, (1, 16, 2, 8, 8), 12, 1 << 20, (256, 16, 1 << 22), 9),
    # Of the released widths, in minutes on two cores.
    "small": Scale(
        "small", _FOUR_LAYERS, ("float32", "bfloat16"),
        (Clip("1,280 tokens", (1, 16, 5, 32, 32), 5, {"bfloat16": {"ours/diffusers": 0.80}}),), 1,
        {name: VAES[name] for name in ("wan21_vae", "wan22_vae")}, torch.float32, (17, 192, 192),
        {"wan21_vae decode": {"ours/diffusers": 0.65}},
        replace(TEXT_ENCODERS["umt5_xxl"], vocab_size=1024, num_layers=2), _FOUR_LAYERS,
        TransformerSpec(model_type="t2v", dim=512, ffn_dim=1536, num_heads=4, num_layers=8), (1, 16, 5, 20, 20), 30,
        1 << 27),
    # The released models, on a graphics card.
    "full": Scale(
        "full", TRANSFORMERS["wan21_t2v_14b"], ("bfloat16", "fp8"),
        (Clip("81 frames 480p", (1, 16, 21, 60, 104), 3, {"bfloat16": {"ours": 5.2}}),
         Clip("81 frames 720p", (1, 16, 21, 90, 160), 1, {"bfloat16": {"ours": 18.5}, "fp8 sage": {"ours": 16.0}})), 2,
        {name: VAES[name] for name in ("wan21_vae", "wan22_vae")}, torch.bfloat16, (81, 720, 1280),
        {"wan21_vae decode": {"ours": 8.0}}, TEXT_ENCODERS["umt5_xxl"],
        replace(TRANSFORMERS["wan21_t2v_14b"], num_layers=3), TRANSFORMERS["wan21_t2v_1_3b"], (1, 16, 21, 60, 104), 30,
        1 << 28, (8192, 360, 1 << 32)),
}


@dataclass(frozen=True)
class Bench:
    """See the module. `rounds` is how often everything is timed, None for what each case has by itself; work that is
    not begun by `deadline`, a value of `time.perf_counter`, is left out."""

    scale: Scale
    device: torch.device
    folder: Path
    report: Report
    deadline: float
    peers: tuple[str, ...]
    rounds: int | None = None
    pinned: float | None = None

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def machine(self) -> Machine:
        """The rates that limits are reckoned with."""
        return Machine(self.device, *self.scale.probe)

    def is_late(self, case: str) -> bool:
        """Whether the time is up; then the report says that `case` is left out."""
        late = time.perf_counter() > self.deadline
        if late:
            self.report.note(case, "left out: the time is up")
        return late

    def times(self, case: str, work: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        """Seconds of every way to do the same work, interleaved. Whoever fails is noted and left out; ours raises."""
        def failed(name: str, error: Exception) -> None:
            if name == "ours":
                raise error
            self.report.note(f"{case}, {name}", f"failed: {explained(error)}")

        return interleave(work, self.rounds or rounds, self.device, self.deadline, failed)

    def beside(self, case: str, names: tuple[str, ...], make: Callable[[str], Callable[[], object]]
               ) -> dict[str, Callable[[], object]]:
        """The work of those peers that are here, as `make(name)` makes it; where it cannot, the report says why."""
        made = {}
        for name in names:
            if name not in self.peers:
                continue
            try:
                made[name] = make(name)
            except Exception as error:
                self.report.note(f"{case}, {name}", f"cannot be made: {explained(error)}")
        return made

    def limit(self, work: Work, form: str) -> float:
        """Seconds of a transformer's work at the rates of this machine; attention is in bfloat16 where weights are in
        FP8."""
        return (work.products / self.machine.matmul(self.multiplied_in(form))
                + work.attention / self.machine.matmul(computed_in(form)))

    def multiplied_in(self, form: str) -> torch.dtype:
        """The type in which weights of a form are multiplied on this device."""
        return FP8.dtype if form == "fp8" and has_fp8_products(self.device) else computed_in(form)

    def model(self, spec: TransformerSpec, form: str, **options: object) -> Model:
        """A transformer of random weights, of the form "float32", "bfloat16" or "fp8"."""
        dtype = computed_in(form)
        part = random_part(spec, self.folder, dtype, fp8=form == "fp8", count=self.scale.numbers, device=self.device)
        return Model(part, part, PRESETS["wan21_t2v_14b"], OneAtATime(self.device), name_of(dtype), **options)


def computed_in(form: str) -> torch.dtype:
    return torch.float32 if form == "float32" else torch.bfloat16


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def explained(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
