"""VACE: blocks beside the transformer's that turn a control video into hints for some of its blocks.

A copy of the video tokens, joined with the embedded control, passes through the VACE blocks; behind each of them a
projection gives a hint that is added, times a strength, to the tokens of the block it belongs to. The hints are
computed when their block comes, so one is held at a time instead of all (Wan2.1 `wan/modules/vace_model.py`).
"""

from torch import Tensor, nn

from ..presets import TransformerSpec
from .inputs import ModelInputs
from .layers import Linear, add_residual
from .model import Block, Shared, WanTransformer


class VaceBlock(Block):
    """A block with a projection of the control before (the first one) and a projection to the hint behind."""

    def __init__(self, spec: TransformerSpec, *, first: bool) -> None:
        super().__init__(spec)
        self.before_proj = Linear(spec.dim, spec.dim) if first else None
        self.after_proj = Linear(spec.dim, spec.dim)


class VaceTransformer(WanTransformer):
    """The transformer with VACE blocks. Without controls they do not run, and it is the model it was made from."""

    model_types = ("vace",)

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__(spec)
        self.vace_patch_embedding = nn.Conv3d(spec.vace_in_dim, spec.dim, spec.patch_size, stride=spec.patch_size)
        self.vace_blocks = nn.ModuleList(VaceBlock(spec, first=index == 0) for index in range(len(spec.vace_layers)))

    def _check_controls(self, inputs: ModelInputs) -> None:
        expected = (self.spec.vace_in_dim, *inputs.latents.shape[2:])
        for control in inputs.controls:
            if control.latents.shape[1:] != expected:
                raise ValueError(f"a VACE control has shape {list(control.latents.shape)}; expected [batch, "
                                 f"{', '.join(map(str, expected))}], as many frames and pixels as the latents.")

    def _side_branches(self, inputs: ModelInputs, x: Tensor, shared: Shared) -> list["Hints"]:
        branches = []
        for control in inputs.controls:
            if control.strength:
                embedded = self._embed_patches(control.latents, self.vace_patch_embedding)
                start = self.vace_blocks[0].before_proj(embedded) + x
                branches.append(Hints(self, start.float(), control.strength, shared))
        return branches


class Hints:
    """The VACE blocks of one call and one control, run as far as the transformer has come."""

    def __init__(self, model: VaceTransformer, tokens: Tensor, strength: float, shared: Shared) -> None:
        """`tokens` [B, L, D]: the control with the video tokens added, overwritten by the blocks."""
        self._blocks = dict(zip(model.spec.vace_layers, model.vace_blocks))
        self._tokens = tokens
        self._strength = strength
        self._shared = shared

    def after_block(self, index: int, x: Tensor) -> Tensor:
        """x with the hint for block `index`, if it gets one."""
        block = self._blocks.get(index)
        if block is None:
            return x
        self._tokens = block(self._tokens, self._shared)
        return add_residual(x, block.after_proj(self._tokens).float() * self._strength)
