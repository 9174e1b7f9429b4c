"""The nano family: tiny, really trained Wan models that ship with the pack.

They have the architecture, tensor names and file format of the released models, so everything that runs those runs
these, anywhere, in seconds. What they were trained on: `wan_core/training/shapes.py`; how, and what they reached: the
README.md of this folder.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent

VAE = _FOLDER / "wan_nano_vae.safetensors"
TEXT_ENCODER = _FOLDER / "wan_nano_umt5.safetensors"
T2V = _FOLDER / "wan_nano_t2v.safetensors"
T2V_HIGH = _FOLDER / "wan_nano_t2v_high_noise.safetensors"
T2V_LOW = _FOLDER / "wan_nano_t2v_low_noise.safetensors"

TRANSFORMERS = (T2V, T2V_HIGH, T2V_LOW)

# Normalised latents of the nano VAE to RGB in [-1, 1], for previews: rows are channels, fitted by least squares to
# rendered clips. The released VAE's channels mean something else.
LATENT_RGB = (
    (-0.397, -0.406, -0.713), (0.923, 0.788, 0.772), (0.283, 0.279, 0.061), (-0.498, -0.898, -1.062),
    (0.022, 0.084, -0.224), (-1.098, -1.304, -1.425), (-0.882, -1.037, -1.170), (-0.916, -0.735, -0.619),
    (1.709, 1.946, 2.281), (-0.071, -0.160, -0.035), (-0.190, -0.630, -0.641), (-0.284, -0.577, -0.570),
    (0.681, 1.032, 0.789), (0.373, 0.568, 0.425), (-1.484, -1.332, -1.257), (0.601, 0.496, 0.521),
)
LATENT_RGB_BIAS = (-0.061, -0.117, -0.130)
