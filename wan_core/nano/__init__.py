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
    (-0.993, -1.490, -1.746), (-0.078, 0.091, 0.264), (-0.099, -0.243, -0.512), (0.601, 0.358, 0.546),
    (0.116, 0.398, 0.168), (0.435, -0.184, -0.131), (0.077, -0.510, -0.607), (0.193, 0.371, 0.423),
    (-0.967, -0.415, 0.006), (0.308, 0.205, 0.373), (0.324, 0.213, 0.195), (0.191, -0.017, 0.086),
    (-0.902, -0.915, -0.788), (-0.283, -0.035, -0.125), (0.003, -0.181, -0.386), (0.000, 0.140, 0.253),
)
LATENT_RGB_BIAS = (-0.069, -0.121, -0.136)
