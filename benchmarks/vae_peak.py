"""Peak resident memory of one VAE decode in a process that does nothing else; `speed.py --only vae-memory` runs it.

    python benchmarks/vae_peak.py wan21_vae ours --frames 129
    python benchmarks/vae_peak.py wan22_vae diffusers --size 96 96

Weights and latents are random, in float32 on the CPU. Printed as JSON.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import peers  # noqa: E402
from benchmarks.cases.bench import SCALES  # noqa: E402
from benchmarks.shared import host_mb, randomise  # noqa: E402
from wan_core.presets import VAES  # noqa: E402
from wan_core.vae import WanVAE  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vae", choices=[name for name in VAES if name in SCALES["small"].vaes])
    parser.add_argument("who", choices=("ours", "diffusers", "comfyui"))
    parser.add_argument("--scale", choices=SCALES, default="small", help="whose widths it has (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=17, help="(default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=(192, 192), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    spec, cpu = SCALES[options.scale].vaes[options.vae], torch.device("cpu")
    height, width = (side // spec.spatial_stride for side in options.size)
    latents = torch.randn(1, spec.z_dim, 1 + (options.frames - 1) // spec.temporal_stride, height, width)
    with torch.no_grad():
        if options.who == "ours":
            randomise(WanVAE(spec)).eval().decode(latents)
        else:
            peers.decode(peers.vae(options.who, spec, torch.float32, cpu), latents)
    print(json.dumps({"peak_mb": round(host_mb("VmHWM"), 1)}))


if __name__ == "__main__":
    main()
