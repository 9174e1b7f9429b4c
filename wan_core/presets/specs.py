"""The frozen records that describe a Wan model: architecture, latent format, sampling defaults.

A spec holds exactly what is needed to build a module on the meta device and nothing about where its weights are. The
numbers come from the official configurations (Wan-Video/Wan2.1 and Wan2.2, wan/configs/).
"""
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TransformerSpec:
    """Architecture of one diffusion transformer (or of each expert of a pair).

    `model_type` is one of 't2v', 'i2v', 'flf2v', 'vace', 'ti2v', 's2v', 'animate'. `in_dim` and `out_dim` count
    latent channels; `image_dim` is the width of the CLIP features (None: no image tokens) and `image_tokens` how many
    of them enter cross-attention (257 for one image, 514 for two). `vace_layers` are the indices of the blocks that a
    VACE block feeds, `vace_in_dim` the channels of the control latent.
    """

    model_type: str
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    image_dim: int | None = None
    image_tokens: int = 0
    vace_layers: tuple[int, ...] = ()
    vace_in_dim: int | None = None

    def __post_init__(self):
        if self.num_heads < 1 or self.dim % self.num_heads:
            raise ValueError(f"a transformer of width {self.dim} cannot have {self.num_heads} heads: "
                             "the width must be a multiple of the number of heads")


@dataclass(frozen=True, kw_only=True)
class VAESpec:
    """Architecture of a causal video VAE and the statistics of its latents.

    `mean` and `std` hold one number per latent channel: the transformer works on (z - mean) / std.
    `temporal_downsample` is in the encoder's order, one flag for each level but the last. `spatial_stride` and
    `temporal_stride` are pixels and frames per latent position.
    """

    kind: str
    dim: int
    decoder_dim: int
    z_dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    spatial_stride: int = 8
    temporal_stride: int = 4

    def __post_init__(self):
        if not len(self.mean) == len(self.std) == self.z_dim:
            raise ValueError(f"a VAE of {self.z_dim} latent channels needs as many means and standard deviations, "
                             f"not {len(self.mean)} and {len(self.std)}")


@dataclass(frozen=True, kw_only=True)
class TinyVAESpec:
    """Architecture of a tiny preview VAE in the TAEHV format, and whose latents it knows.

    `vae` is the entry of `VAES` whose latents it decodes and makes, `mean` and `std` are that VAE's. `widths` are the
    decoder's channels, from the latent to the pixels, `encoder_width` those of the encoder; `patch` pixels a side are
    one position of its widest pictures.
    """

    vae: str
    z_dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch: int = 1
    widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    encoder_width: int = 64
    temporal_stride: int = 4

    @property
    def kind(self) -> str:
        """Always 'tiny'; those of a `VAESpec` are others."""
        return "tiny"

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent position."""
        return 8 * self.patch


@dataclass(frozen=True, kw_only=True)
class TextEncoderSpec:
    """Architecture of a UMT5 encoder. `text_len` is the number of tokens a prompt is cut and padded to."""

    vocab_size: int
    dim: int
    dim_attn: int
    dim_ffn: int
    num_heads: int
    num_layers: int
    num_buckets: int = 32
    max_distance: int = 128
    shared_pos: bool = False
    text_len: int = 512


@dataclass(frozen=True, kw_only=True)
class CLIPVisionSpec:
    """Architecture of a CLIP vision transformer. Sizes in pixels; `out_dim` is the width of the joint space."""

    image_size: int
    patch_size: int
    dim: int
    mlp_dim: int
    num_heads: int
    num_layers: int
    out_dim: int

    def __post_init__(self):
        if self.num_heads < 1 or self.dim % self.num_heads or self.image_size % self.patch_size:
            raise ValueError(f"a CLIP vision model of width {self.dim} cannot have {self.num_heads} heads, or pictures "
                             f"of {self.image_size} pixels no patches of {self.patch_size}: both must divide evenly")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a model is sampled unless the user says otherwise.

    `shift` is the timestep shift of the flow schedule. `guidance_low` applies below `boundary` and `guidance_high` at
    or above it (sigma, 0..1); for a single model `boundary` is None and both are equal. `frames` is the length of one
    run (for audio and character models: of one clip of the whole), sizes are pixels.
    """

    steps: int
    shift: float
    guidance_low: float
    guidance_high: float
    fps: int
    frames: int
    width: int
    height: int
    negative_prompt: str
    solver: str = "unipc"
    boundary: float | None = None


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One released model: which parts it is made of (keys into the tables) and how it is sampled.

    `experts` tells that the model is a pair of transformers of the same architecture, switched at `sampling.boundary`.
    """

    name: str
    title: str
    transformer: str
    vae: str
    text_encoder: str
    sampling: Sampling
    experts: bool = False
    clip_vision: str | None = None
