"""Train and measure the nano family: `python -m wan_core.training vae | vae22 | preview | t2v | experts | i2v | ti2v |
vace | evaluate | formats | calibrations | caches`.

Each part reads what those before it wrote into `wan_core/nano`, so the whole family is trained in this order. A run
that was stopped goes on where it was.
"""

import argparse
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import nano
from ..cache.calibration import BUNDLED, write_tables
from ..calibrate import calibrate
from ..models import add_vace, load_clip_vision, load_experts, load_model, load_text_encoder, load_vae
from ..presets import PRESETS, TEXT_ENCODERS
from ..text import Tokenizer
from ..weights import load_module, open_model, save_weights, write_quantised
from .clips import Clips
from .evaluate import evaluate, evaluate_caches, evaluate_formats, evaluate_inpainting, evaluate_pictures
from .loop import NanoTraining
from .nano_i2v import KnownClips, train_i2v
from .nano_t2v import TextToVideo, expert_options, train_expert, train_t2v
from .nano_ti2v import train_ti2v
from .nano_tiny import TinyTraining, agreement_psnr, train_tiny
from .nano_tokenizer import train_tokenizer
from .nano_vace import ControlledClips, train_vace
from .nano_vae import VAE_TRAININGS, channels_read, reconstruction_psnr, train_vae
from .shapes import all_prompts, caption, held_out_scenes

log = logging.getLogger(__name__)

# Steps of the runs that caches are measured with and on.
CACHE_STEPS = 30


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m wan_core.training", description=__doc__)
    parts = {"vae": _vae, "vae22": _vae, "preview": _preview, "t2v": _t2v, "experts": _experts, "i2v": _i2v,
             "ti2v": _ti2v, "vace": _vace, "evaluate": _evaluate, "formats": _formats,
             "calibrations": _calibrations, "caches": _caches}
    parser.add_argument("part", choices=list(parts))
    parser.add_argument("--run", type=Path, default=Path("out/nano"), help="folder for states and logs")
    parser.add_argument("--steps", type=int, help="training steps (default: those of the shipped models)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    parts[options.part](options)


def _vae(options: argparse.Namespace) -> None:
    training = VAE_TRAININGS[options.part]
    vae = train_vae(replace(training, steps=options.steps or training.steps), options.run)
    path = {"vae": nano.VAE, "vae22": nano.VAE22}[options.part]
    _save(path, vae.state_dict(), path.stem)
    _keep_log(options.run / f"{options.part}.csv")


def _preview(options: argparse.Namespace) -> None:
    training, vae = TinyTraining(), load_vae().module()
    tiny = train_tiny(vae, replace(training, steps=options.steps or training.steps), options.run)
    _save(nano.TINY_VAE, tiny.state_dict(), nano.TINY_VAE.stem)
    _keep_log(options.run / "preview.csv")


def _t2v(options: argparse.Namespace) -> None:
    pieces = train_tokenizer(all_prompts(), TEXT_ENCODERS["nano_umt5"].vocab_size)
    training = NanoTraining(steps=options.steps or 5000)
    clips = Clips(load_vae().module(), Tokenizer.from_bytes(pieces), training, options.run / "latents.pt")
    model = train_t2v(training, clips, options.run)
    _save(nano.T2V, model.transformer.state_dict(), "wan_nano_t2v")
    spiece = torch.frombuffer(bytearray(pieces), dtype=torch.uint8)
    _save(nano.TEXT_ENCODER, {**model.text_encoder.state_dict(), "spiece_model": spiece}, "wan_nano_umt5")
    _keep_log(options.run / "t2v.csv")


def _experts(options: argparse.Namespace) -> None:
    boundary = PRESETS["nano_t2v_a"].sampling.boundary
    text_encoder = load_text_encoder()
    base = TextToVideo()
    load = {"transformer": load_model().high.file, "text_encoder": text_encoder.part.file}
    for name, file in load.items():
        module = load_module(getattr(base, name), file, dtype_for=lambda _, stored: torch.float32)
        module.requires_grad_(True)
    training = NanoTraining(steps=options.steps or 1600, muon_lr=5e-4, adam_lr=5e-4)
    clips = Clips(load_vae().module(), text_encoder.tokenizer, training, options.run / "latents.pt")
    for path, high in ((nano.T2V_HIGH, True), (nano.T2V_LOW, False)):
        name = "high_noise" if high else "low_noise"
        model = train_expert(name, base, expert_options(training, boundary, high=high), clips, options.run)
        # As most people have the released pair, and it keeps the family small.
        whole = options.run / path.name
        _save(whole, model.transformer.state_dict(), f"wan_nano_t2v_{name}")
        write_quantised(open_model(whole, "transformer")[0], "fp8_scaled", path, lambda done, of: None)
        _keep_log(options.run / f"{name}.csv")


def _i2v(options: argparse.Namespace) -> None:
    vae, text_encoder = load_vae().module(), load_text_encoder()
    training = NanoTraining(steps=options.steps or 2500)
    clips = Clips(vae, text_encoder.tokenizer, training, options.run / "latents.pt")
    known = KnownClips(vae, clips, training, options.run / "known.pt")
    model = train_i2v(training, clips, known, text_encoder.module(), _trained_t2v(), options.run)
    _save(nano.I2V, model.transformer.state_dict(), "wan_nano_i2v")
    _save(nano.CLIP_VISION, model.vision.state_dict(), "wan_nano_clip_vision")
    _keep_log(options.run / "i2v.csv")


def _ti2v(options: argparse.Namespace) -> None:
    vae, text_encoder = load_vae(nano.VAE22).module(), load_text_encoder()
    training = NanoTraining(steps=options.steps or 3500)
    clips = Clips(vae, text_encoder.tokenizer, training, options.run / "ti2v_latents.pt")
    model = train_ti2v(training, clips, channels_read(vae), text_encoder.module(), _trained_t2v(), options.run)
    _save(nano.TI2V, model.state_dict(), "wan_nano_ti2v")
    _keep_log(options.run / "ti2v.csv")


def _vace(options: argparse.Namespace) -> None:
    vae, text_encoder = load_vae().module(), load_text_encoder()
    training = NanoTraining(steps=options.steps or 2000, clips=2048)
    clips = Clips(vae, text_encoder.tokenizer, training, options.run / "vace_latents.pt")
    controlled = ControlledClips(vae, clips, training, options.run / "controls.pt")
    module = train_vace(training, clips, controlled, text_encoder.module(), _trained_t2v(), options.run)
    _save(nano.VACE_MODULE, module, "wan_nano_vace_module")
    _keep_log(options.run / "vace.csv")


def _trained_t2v() -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_model().low.file.items()}


def _evaluate(options: argparse.Namespace) -> None:
    """Write figures.json: the VAEs on 32 whole clips, and each model on 64 held-out prompts."""
    vae, vae22, text_encoder, single = load_vae(), load_vae(nano.VAE22), load_text_encoder(), load_model()
    tiny = load_vae(nano.TINY_VAE)
    figures: dict[str, object] = {"vae_psnr_db": round(reconstruction_psnr(vae.module(), 32), 2),
                                  "preview_psnr_db": round(agreement_psnr(tiny.module(), vae.module(), 32), 2),
                                  "vae22_psnr_db": round(reconstruction_psnr(vae22.module(), 32), 2)}
    for name, model in (("t2v", single), ("t2v_experts", load_experts())):
        figures[name] = asdict(evaluate(model, vae, text_encoder))
        figures[f"{name}_without_guidance"] = asdict(evaluate(model, vae, text_encoder, guidance=(1.0, 1.0)))
    ti2v = load_model("nano-ti2v")
    figures["ti2v"] = asdict(evaluate(ti2v, vae22, text_encoder))
    figures["ti2v_first_frame"] = asdict(evaluate_pictures(ti2v, vae22, text_encoder))
    figures["i2v_first_frame"] = asdict(
        evaluate_pictures(load_model("nano-i2v"), vae, text_encoder, load_clip_vision()))
    figures["vace_inpainting"] = asdict(evaluate_inpainting(add_vace(single, "nano"), vae, text_encoder))
    text = json.dumps(figures, indent=2)
    (nano.VAE.parent / "figures.json").write_text(text + "\n")
    log.info("%s", text)


def _formats(options: argparse.Namespace) -> None:
    """Write formats.json: the text-to-video model in every weight format, on 512 held-out prompts."""
    figures = {}
    for name, scores in evaluate_formats(load_model(), load_vae(), load_text_encoder()):
        figures[name] = asdict(scores)
        log.info("%s: %s", name, figures[name])
        (nano.VAE.parent / "formats.json").write_text(json.dumps(figures, indent=2) + "\n")


def _calibrations(options: argparse.Namespace) -> None:
    """Write what MagCache and TeaCache have to know of the bundled text-to-video models: 8 prompts, 30 steps."""
    measured = []
    for model in (load_model(), load_experts()):
        prompts = [caption(scene) for scene in held_out_scenes(8)]
        measured.append(calibrate(prompts, model, steps=CACHE_STEPS))
        log.info("%s", measured[-1])
    write_tables(measured, BUNDLED)


def _caches(options: argparse.Namespace) -> None:
    """Write caches.json: the text-to-video models with every step cache, on 128 held-out prompts."""
    figures = {}
    for model in (load_model(), load_experts()):
        rows = figures[model.preset.name] = {}
        for name, scores in evaluate_caches(model, load_vae(), load_text_encoder(), steps=CACHE_STEPS,
                                            prompts=128):
            rows[name] = asdict(scores)
            log.info("%s, %s: %s", model.preset.name, name, rows[name])
            (nano.VAE.parent / "caches.json").write_text(json.dumps(figures, indent=2) + "\n")


def _save(path: Path, tensors: Mapping[str, Tensor], title: str) -> None:
    """Write trained weights in bfloat16, as the released models are; bytes stay bytes."""
    half = {name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()}
    save_weights(path, half, {"format": "pt", "title": title})
    log.info("wrote %s, %.2f MB", path.name, path.stat().st_size / 1e6)


def _keep_log(path: Path) -> None:
    logs = nano.VAE.parent / "logs"
    logs.mkdir(exist_ok=True)
    shutil.copyfile(path, logs / path.name)


if __name__ == "__main__":
    main()
