"""Small random transformers of every branch, inputs for them, and the same model in diffusers."""

import re
from collections.abc import Sequence

import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from torch.utils._python_dispatch import TorchDispatchMode

from wan_core.dit import VaceControl, VaceTransformer, WanTransformer
from wan_core.presets import TransformerSpec

SPEC = TransformerSpec(model_type="t2v", dim=256, ffn_dim=384, num_heads=2, num_layers=3, text_dim=48)

# Official part of a block -> diffusers' name; the rest of a parameter's name is kept.
DIFFUSERS_BLOCK = {
    "self_attn.o": "attn1.to_out.0", "self_attn.norm_q": "attn1.norm_q", "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.o": "attn2.to_out.0", "cross_attn.norm_q": "attn2.norm_q", "cross_attn.norm_k": "attn2.norm_k",
    **{f"self_attn.{part}": f"attn1.to_{part}" for part in "qkv"},
    **{f"cross_attn.{part}": f"attn2.to_{part}" for part in "qkv"},
    "cross_attn.k_img": "attn2.add_k_proj", "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "modulation": "scale_shift_table",
    "before_proj": "proj_in", "after_proj": "proj_out",
}
DIFFUSERS_ROOT = {
    "patch_embedding": "patch_embedding", "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out",
    "head.modulation": "scale_shift_table", "vace_patch_embedding": "vace_patch_embedding",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
}


def diffusers_name(name: str) -> str:
    """Our (the official) parameter name in diffusers' classes."""
    leaf = re.search(r"\.(weight|bias)$", name)
    stem, leaf = name.removesuffix(leaf[0] if leaf else ""), leaf[0] if leaf else ""
    if match := re.fullmatch(r"((?:vace_)?blocks\.\d+)\.(.+)", stem):
        return f"{match[1]}.{DIFFUSERS_BLOCK[match[2]]}{leaf}"
    return DIFFUSERS_ROOT[stem] + leaf


def transformer(spec: TransformerSpec = SPEC, seed: int = 0) -> WanTransformer:
    """Random weights; norms, biases and positions too, so that none of them can be mixed up unnoticed."""
    torch.manual_seed(seed)
    model = (VaceTransformer if spec.model_type == "vace" else WanTransformer)(spec).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias") or name.startswith(("img_emb.proj.0", "img_emb.proj.4")):
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif name == "img_emb.emb_pos":
            parameter.normal_()
    return model


def in_bfloat16(model: WanTransformer) -> WanTransformer:
    """The matrices that the official code runs in bf16; the float32 islands stay."""
    for name, parameter in model.named_parameters():
        if not any(part in name for part in ("time_", "head.", "norm", "modulation")):
            parameter.data = parameter.data.bfloat16()
    return model


def inputs(spec: TransformerSpec = SPEC, batch: int = 1, grid: tuple[int, int, int] = (3, 6, 8), tokens: int = 20):
    """Latents, timesteps and a text embedding of `tokens` rows."""
    generator = torch.Generator().manual_seed(batch)
    return (torch.randn(batch, spec.in_dim, *grid, generator=generator),
            torch.linspace(987, 3.5, batch),
            torch.randn(batch, tokens, spec.text_dim, generator=generator))


class Sizes(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


class Oracle:
    """The diffusers model with the weights of `model`."""

    def __init__(self, model: WanTransformer) -> None:
        self.spec = spec = model.spec
        arguments = dict(
            num_attention_heads=spec.num_heads, attention_head_dim=spec.dim // spec.num_heads, in_channels=spec.in_dim,
            out_channels=spec.out_dim, text_dim=spec.text_dim, freq_dim=spec.freq_dim, ffn_dim=spec.ffn_dim,
            num_layers=spec.num_layers, image_dim=spec.image_dim,
            added_kv_proj_dim=spec.dim if spec.image_dim else None,
            pos_embed_seq_len=spec.image_tokens if spec.model_type == "flf2v" else None)
        if spec.model_type == "vace":
            self.module = WanVACETransformer3DModel(**arguments, vace_layers=list(spec.vace_layers),
                                                    vace_in_channels=spec.vace_in_dim)
        else:
            self.module = WanTransformer3DModel(**arguments)
        self.module.eval()
        self.module.load_state_dict({diffusers_name(name): value for name, value in model.state_dict().items()})

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor,
                 features: torch.Tensor | None = None, controls: Sequence[VaceControl] = ()) -> torch.Tensor:
        """Velocity [B, C, T, H, W]. `timestep` is [B] or [B, T], `context` [B, L, text_dim] without its padding,
        `features` [B, N, image_dim] of all images."""
        if timestep.ndim == 2:  # diffusers takes one for each token
            timestep = timestep.repeat_interleave(latents.shape[3] * latents.shape[4] // 4, 1)
        if features is not None and self.spec.model_type == "flf2v":  # two rows of its batch are one sample's images
            features = features.unflatten(1, (2, -1)).flatten(0, 1)
        padded = torch.nn.functional.pad(context, (0, 0, 0, self.spec.text_len - context.shape[1]))
        given = (latents, timestep, padded, features)
        return self._controlled(given, controls) if controls else self.module(*given, return_dict=False)[0]

    def _controlled(self, given: tuple, controls: Sequence[VaceControl]) -> torch.Tensor:
        """One control as diffusers takes it. Of several, the hints of those before are added to the last one's."""
        blocks = self.module.vace_blocks
        if len(controls) == 1:
            scale = torch.full((len(blocks),), controls[0].strength)
            return self.module(*given, control_hidden_states=controls[0].latents, control_hidden_states_scale=scale,
                               return_dict=False)[0]
        added = [0.0] * len(blocks)
        for control in controls:
            handles = [block.register_forward_hook(_adding(added, index, control.strength))
                       for index, block in enumerate(blocks)]
            result = self.module(*given, control_hidden_states=control.latents, return_dict=False)[0]
            for handle in handles:
                handle.remove()
        return result


def _adding(added: list, index: int, strength: float):
    """A hook that returns all hints of a VACE block so far, and keeps their sum in added[index]."""
    def hook(block, args, output):
        added[index] = added[index] + output[0] * strength
        return added[index], output[1]
    return hook
