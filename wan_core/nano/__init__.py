"""The nano family: tiny, really trained Wan models that ship with the pack.

They have the architecture, tensor names and file format of the released models, so everything that runs those runs
these, anywhere, in seconds. What they were trained on: `wan_core/training/shapes.py`; how, and what they reached: the
README.md of this folder.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent

VAE = _FOLDER / "wan_nano_vae.safetensors"
VAE22 = _FOLDER / "wan_nano_vae22.safetensors"
TINY_VAE = _FOLDER / "wan_nano_tiny_vae.safetensors"
TEXT_ENCODER = _FOLDER / "wan_nano_umt5.safetensors"
CLIP_VISION = _FOLDER / "wan_nano_clip_vision.safetensors"
T2V = _FOLDER / "wan_nano_t2v.safetensors"
T2V_HIGH = _FOLDER / "wan_nano_t2v_high_noise.safetensors"
T2V_LOW = _FOLDER / "wan_nano_t2v_low_noise.safetensors"
VACE_MODULE = _FOLDER / "wan_nano_vace_module.safetensors"
TI2V = _FOLDER / "wan_nano_ti2v.safetensors"
I2V = _FOLDER / "wan_nano_i2v.safetensors"

# What the bundled single transformers are called where a file is asked for.
NAMES = {"nano": T2V, "nano-i2v": I2V, "nano-ti2v": TI2V}

TRANSFORMERS = (T2V, T2V_HIGH, T2V_LOW, I2V, TI2V)
