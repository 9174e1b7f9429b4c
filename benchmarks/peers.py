"""Other implementations of the same models, with random weights, to be measured beside ours in one process.

diffusers and transformers where they are installed, with the fastest attention that they have here, and ComfyUI's
model code where it is found (COMFYUI_PATH, else ~/comfy/ComfyUI). Each is called as its own pipeline calls it, and is
left out, with a reason, where it cannot be. Nothing is downloaded.
"""

import contextlib
import copy
import functools
import importlib.metadata
import importlib.util
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.shared import median_time, randomise
from wan_core.presets import TextEncoderSpec, TransformerSpec, VAESpec

# What diffusers can attend with that needs no download, the likely fastest first.
DIFFUSERS_ATTENTION = {"cuda": ("_flash_3", "flash", "_native_cudnn", "_native_flash", "native"), "cpu": ("native",)}

# latents [B, C, T, H, W], timestep [B], text [B, 512, width] -> velocity
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def available() -> dict[str, str]:
    """The implementations by name, each with a reason why it is not here, or nothing."""
    packages = {name: "" if importlib.util.find_spec(name) else "not installed"
                for name in ("diffusers", "transformers")}
    return {**packages, "comfyui": "" if comfy_folder() else "not found; set COMFYUI_PATH"}


def versions() -> dict[str, str]:
    """The versions of what is installed of others' packages, fast attention among them."""
    found = {}
    for name in ("diffusers", "transformers", "triton", "sageattention", "flash_attn", "flash_attn_3"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if folder := comfy_folder():
        stated = re.search(r'__version__ = "(.+?)"', (folder / "comfyui_version.py").read_text(encoding="utf-8"))
        found["comfyui"] = stated[1] if stated else "unknown"
    return found


def comfy_folder() -> Path | None:
    folder = Path(os.environ.get("COMFYUI_PATH", Path.home() / "comfy" / "ComfyUI"))
    return folder if (folder / "comfy" / "ldm" / "wan").is_dir() and (folder / "comfyui_version.py").is_file() else None


@functools.cache
def comfy(device_type: str) -> types.SimpleNamespace:
    """ComfyUI's Wan modules. Raises ImportError where it, or a package of its own, is missing."""
    if str(comfy_folder()) not in sys.path:
        # Behind everything else: it has modules with names that are used here, too.
        sys.path.append(str(comfy_folder()))
    import comfy.cli_args

    # It looks for a graphics card when it is imported.
    comfy.cli_args.args.cpu = device_type == "cpu"
    import comfy.ops
    from comfy.ldm.wan import model, vae, vae2_2

    return types.SimpleNamespace(ops=comfy.ops.disable_weight_init, transformer=model.WanModel, wan21=vae.WanVAE,
                                 wan22=vae2_2.WanVAE)


def transformer(peer: str, spec: TransformerSpec, dtype: torch.dtype, device: torch.device) -> Forward:
    """A transformer of the "t2v" type by diffusers or ComfyUI."""
    with torch.device(device):
        if peer == "comfyui":
            found = comfy(device.type)
            one = found.transformer(model_type="t2v", dim=spec.dim, ffn_dim=spec.ffn_dim, num_heads=spec.num_heads,
                                    num_layers=1, in_dim=spec.in_dim, out_dim=spec.out_dim, text_dim=spec.text_dim,
                                    operations=found.ops, device=device, dtype=dtype)
            module = _deep(randomise(one), spec.num_layers)
            return lambda latents, timestep, text: module(latents.to(dtype), timestep, text.to(dtype))
        from diffusers import WanTransformer3DModel
        from diffusers.utils import logging

        # It warns of casts and of chosen attention; both are meant.
        logging.set_verbosity_error()
        one = WanTransformer3DModel(
            num_attention_heads=spec.num_heads, attention_head_dim=spec.dim // spec.num_heads, in_channels=spec.in_dim,
            out_channels=spec.out_dim, text_dim=spec.text_dim, ffn_dim=spec.ffn_dim, num_layers=1)
        module = _deep(randomise(one).to(dtype).eval(), spec.num_layers)
    module.set_attention_backend(best_attention(dtype, device))
    return lambda latents, timestep, text: module(
        hidden_states=latents.to(dtype), timestep=timestep, encoder_hidden_states=text.to(dtype), return_dict=False)[0]


def _deep(module: nn.Module, layers: int) -> nn.Module:
    """A module with copies of its one block, so that no more is ever there than what is measured."""
    module.blocks = nn.ModuleList([module.blocks[0], *(copy.deepcopy(module.blocks[0]) for _ in range(layers - 1))])
    return module


def attend(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """diffusers' attention with one of its backends; q, k, v [B, L, heads, head_dim]."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return lambda q, k, v: dispatch_attention_fn(q, k, v, backend=backend)


@functools.cache
def best_attention(dtype: torch.dtype, device: torch.device) -> str:
    """The backend with which diffusers attends fastest here, tried on a few thousand tokens."""
    names = DIFFUSERS_ATTENTION.get(device.type, ("native",))
    if len(names) == 1:
        return names[0]
    q, k, v = (torch.randn(1, 8192, 12, 128, device=device, dtype=dtype) for _ in range(3))
    seconds = {}
    for name in names:
        try:
            seconds[name] = median_time(lambda name=name: attend(name)(q, k, v), 3, device)
        # Packages that are missing, or too old, or not for this device.
        except Exception:
            continue
    return min(seconds, key=seconds.get, default="native")


def vae(peer: str, spec: VAESpec, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A VAE by diffusers or ComfyUI; see `decode` and `encode`."""
    patched = spec.kind == "wan22"
    if peer == "comfyui":
        found = comfy(device.type)
        settings = {"dim": spec.dim, "z_dim": spec.z_dim, "dim_mult": list(spec.dim_mult),
                    "num_res_blocks": spec.num_res_blocks, "temperal_downsample": list(spec.temporal_downsample)}
        if patched:
            module = found.wan22(dec_dim=spec.decoder_dim, **settings)
        else:
            module = found.wan21(**settings)
    else:
        from diffusers import AutoencoderKLWan
        from diffusers.utils import logging

        logging.set_verbosity_error()
        patches = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
        module = AutoencoderKLWan(
            base_dim=spec.dim, decoder_base_dim=spec.decoder_dim, z_dim=spec.z_dim, num_res_blocks=spec.num_res_blocks,
            scale_factor_spatial=spec.spatial_stride, **(patches if patched else {}))
    return randomise(module).to(device, dtype).eval()


def decode(module: nn.Module, latents: Tensor) -> Tensor:
    """Raw latents on the host to pixels on the host."""
    weight = next(module.parameters())
    pixels = module.decode(latents.to(weight.device, weight.dtype))
    return (pixels if isinstance(pixels, Tensor) else pixels.sample).float().cpu()


def encode(module: nn.Module, video: Tensor) -> Tensor:
    """Pixels on the host to the mean of their latents on the host."""
    weight = next(module.parameters())
    latents = module.encode(video.to(weight.device, weight.dtype))
    return (latents if isinstance(latents, Tensor) else latents.latent_dist.mean).float().cpu()


def text_encoder(spec: TextEncoderSpec, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """transformers' UMT5: token ids and mask [B, L] -> embeddings [B, L, width]. diffusers fills prompts up to 512."""
    from transformers import UMT5Config, UMT5EncoderModel

    settings = UMT5Config(vocab_size=spec.vocab_size, d_model=spec.dim, d_kv=spec.dim_attn // spec.num_heads,
                          d_ff=spec.dim_ffn, num_layers=1, num_heads=spec.num_heads, dropout_rate=0.0,
                          relative_attention_num_buckets=spec.num_buckets,
                          relative_attention_max_distance=spec.max_distance, feed_forward_proj="gated-gelu")
    with torch.device(device):
        module = randomise(UMT5EncoderModel(settings)).to(dtype).eval()
    blocks = module.encoder.block
    module.encoder.block = nn.ModuleList([blocks[0], *(copy.deepcopy(blocks[0]) for _ in range(spec.num_layers - 1))])
    return lambda ids, mask: module(ids.to(device), mask.to(device)).last_hidden_state
