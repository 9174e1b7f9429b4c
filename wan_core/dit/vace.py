"""VACE: blocks beside the transformer's that turn a control video into hints for some of its blocks.

A copy of the video tokens, joined with the embedded control, passes through the VACE blocks; behind each of them a
projection gives a hint that is added, times a strength, to the tokens of the block it belongs to. The hints are
computed when their block comes, so one is held at a time instead of all (Wan2.1 `wan/modules/vace_model.py`).
"""

from collections.abc import Callable

from torch import Tensor, nn

from ..presets import TransformerSpec
from .inputs import ModelInputs
from .layers import Linear, add_residual
from .model import Block, Shared, WanTransformer
from .time import TimeRows


class VaceBlock(Block):
    """A block with a projection of the control before (the first one) and a projection to the hint behind."""

    def __init__(self, spec: TransformerSpec, *, first: bool) -> None:
        super().__init__(spec)
        self.before_proj = Linear(spec.dim, spec.dim) if first else None
        self.after_proj = Linear(spec.dim, spec.dim)

    def forward(self, tokens: Tensor, shared: Shared, x: Tensor, strength: float,
                video: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """The branch's tokens [B, L, D] behind this block, and x [B, L, D] with the hint, times `strength`, added.

        `video` gives the embedded video [B, L, D], which the first block adds to its tokens, the embedded control.
        """
        if self.before_proj is not None:
            tokens = (self.before_proj(tokens) + video()).float()
        tokens = super().forward(tokens, shared)

        def add(part: Tensor, own: TimeRows, start: int) -> Tensor:
            hint = self.after_proj(tokens[:, start:start + part.shape[1]])
            return add_residual(part, hint.float() * strength)

        return tokens, shared.in_chunks(add, x, shared.time)


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

    def _side_branches(self, inputs: ModelInputs, shared: Shared) -> list["Hints"]:
        def video() -> Tensor:
            return self._embed_patches(inputs.latents, self.patch_embedding)

        return [Hints(self, self._embed_patches(control.latents, self.vace_patch_embedding), control.strength, shared,
                      video) for control in inputs.controls if control.strength]


class Hints:
    """The VACE blocks of one call and one control, run as far as the transformer has come."""

    def __init__(self, model: VaceTransformer, tokens: Tensor, strength: float, shared: Shared,
                 video: Callable[[], Tensor]) -> None:
        """`tokens` [B, L, D]: the embedded control; `video` embeds the video anew, which is cheaper than to keep it."""
        self._blocks = dict(zip(model.spec.vace_layers, model.vace_blocks))
        self._tokens = tokens
        self._strength = strength
        self._shared = shared
        self._video = video

    def after_block(self, index: int, x: Tensor) -> Tensor:
        """x with the hint for block `index`, if it gets one."""
        block = self._blocks.get(index)
        if block is None:
            return x
        self._tokens, x = block(self._tokens, self._shared.at(index), x, self._strength, self._video)
        return x
