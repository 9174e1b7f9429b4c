"""Our engine beside diffusers: same work, same process, interleaved, medians. On a CPU, or with --device cuda.

    python benchmarks/compare.py dit --dtype bfloat16
    python benchmarks/compare.py vae
    python benchmarks/compare.py vae22
    python benchmarks/compare.py vae-memory --vae wan22_vae

Weights and inputs are random: dense arithmetic takes the same time whatever the numbers, if they are not zeros. `limit`
is the machine's own rate for a large matrix product (or a channels-last convolution), measured in the same run. Peak
memory is that of a process that does nothing else. Results are printed as JSON, one object a line.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from wan_core.dit import ModelInputs, WanTransformer  # noqa: E402
from wan_core.presets import VAES, TransformerSpec  # noqa: E402
from wan_core.vae import WanVAE  # noqa: E402

# The issue-sized case: four layers as wide as the 1.3B model's, 5 x 16 x 16 = 1,280 tokens, a prompt of 60 tokens.
SPEC = TransformerSpec(model_type="t2v", dim=1536, ffn_dim=8960, num_heads=12, num_layers=4)
GRID = (5, 32, 32)
PROMPT_TOKENS = 60
VIDEO = (17, 192, 192)


def main() -> None:
    works = {"dit": transformer, "vae": vae_decode, "vae22": vae22_decode, "vae-memory": vae_memory,
             "vae-peak": vae_peak}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", choices=works, help="\n".join(
        f"{name + ':':<12}{function.__doc__.splitlines()[0]}" for name, function in works.items()))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of dit")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs after the warm-up (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--frames", type=int, default=VIDEO[0], help="of VAEs, but vae-memory (default: %(default)s)")
    parser.add_argument("--side", type=int, default=VIDEO[1], help="width and height of videos (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="of all but vae-memory (default: %(default)s)")
    parser.add_argument("--which", choices=("ours", "diffusers"), default="ours", help="of vae-peak")
    parser.add_argument("--vae", choices=VAES, default="wan21_vae", help="of vae-memory and vae-peak")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        works[options.work](options)


def transformer(options: argparse.Namespace) -> None:
    """One forward of a four-layer transformer."""
    from diffusers import WanTransformer3DModel

    dtype = getattr(torch, options.dtype)
    ours = randomise(WanTransformer(SPEC)).to(options.device, dtype).eval()
    theirs = WanTransformer3DModel(num_attention_heads=SPEC.num_heads, attention_head_dim=128, in_channels=16,
                                   out_channels=16, ffn_dim=SPEC.ffn_dim, num_layers=SPEC.num_layers)
    theirs = randomise(theirs).to(options.device, dtype).eval()
    latents, timestep = torch.randn(1, 16, *GRID).to(options.device), torch.tensor([500.0], device=options.device)
    context = torch.zeros(1, 512, SPEC.text_dim, device=options.device)
    context[:, :PROMPT_TOKENS] = torch.randn(1, PROMPT_TOKENS, SPEC.text_dim)
    ours_inputs = ModelInputs(latents, timestep, ours.prepare_text(context))
    inputs = {"hidden_states": latents.to(dtype), "timestep": timestep, "encoder_hidden_states": context.to(dtype)}
    times = interleave({"ours": lambda: ours(ours_inputs),
                        "diffusers": lambda: theirs(**inputs, return_dict=False)}, options.rounds)
    tokens = GRID[0] * GRID[1] * GRID[2] // 4
    flops = transformer_flops(SPEC, tokens)
    show(options, times, flops=flops, limit=matmul_rate(dtype, options.device), tokens=tokens)


def vae_decode(options: argparse.Namespace) -> None:
    """Full-width Wan 2.1 VAE decode of 17 frames of 192x192, in float32."""
    compare_decoders("wan21_vae", options)


def vae22_decode(options: argparse.Namespace) -> None:
    """Full-width Wan 2.2 VAE decode of 17 frames of 192x192, in float32."""
    compare_decoders("wan22_vae", options)


def compare_decoders(vae: str, options: argparse.Namespace) -> None:
    decoders = {which: vae_decoder(vae, which, options) for which in ("ours", "diffusers")}
    times = interleave(decoders, options.rounds)
    show(options, times, limit=convolution_rate(options.device), frames=options.frames, side=options.side)


def vae_memory(options: argparse.Namespace) -> None:
    """Peak resident memory of a decode, each in a process of its own, for 17 and for 129 frames."""
    peaks = {}
    for which, frames in (("ours", 17), ("diffusers", 17), ("ours", 129)):
        command = [sys.executable, __file__, "vae-peak", "--vae", options.vae, "--which", which,
                   "--frames", str(frames), "--side", str(options.side), "--threads", str(options.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[f"{which}_{frames}"] = json.loads(done.stdout.splitlines()[-1])["peak_mb"]
    grown = (129 - 17) * 3 * options.side ** 2 * 4 / 1e6
    print(json.dumps({"work": "vae-memory", "vae": options.vae, "side": options.side, "peak_mb": peaks,
                      "growth_mb": round(peaks["ours_129"] - peaks["ours_17"], 1),
                      "output_growth_mb": round(grown, 1)}))


def vae_peak(options: argparse.Namespace) -> None:
    """Decode once and print this process's peak resident memory (the work behind `vae-memory`)."""
    vae_decoder(options.vae, options.which, options)()
    print(json.dumps({"peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)}))


def vae_decoder(vae: str, which: str, options: argparse.Namespace) -> Callable[[], torch.Tensor]:
    spec = VAES[vae]
    side = options.side // spec.spatial_stride
    latents = torch.randn(1, spec.z_dim, (options.frames - 1) // 4 + 1, side, side)
    if which == "ours":
        ours = randomise(WanVAE(spec)).to(options.device).eval()
        return lambda: ours.decode(latents)
    from diffusers import AutoencoderKLWan

    patches = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
    theirs = AutoencoderKLWan(
        base_dim=spec.dim, decoder_base_dim=spec.decoder_dim, z_dim=spec.z_dim, num_res_blocks=spec.num_res_blocks,
        scale_factor_spatial=spec.spatial_stride, **(patches if spec.kind == "wan22" else {}))
    theirs = randomise(theirs).to(options.device).eval()
    return lambda: theirs.decode(latents.to(options.device), return_dict=False)[0].cpu()


def randomise(module: nn.Module) -> nn.Module:
    """Small random values everywhere, also where an initialisation puts zeros."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module


def interleave(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each piece of work, in turn, `rounds` times after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - began)
    return times


def transformer_flops(spec: TransformerSpec, tokens: int) -> float:
    """Multiply-adds counted twice, with the whole 512-token text as officially computed."""
    dim, text = spec.dim, spec.text_len
    products = tokens * dim * (6 * dim + 2 * spec.ffn_dim) + 2 * text * dim * dim
    return 2.0 * spec.num_layers * (products + 2 * tokens * dim * (tokens + text))


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a product of large square matrices."""
    side = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(side, side).to(device, dtype) for _ in range(2))
    return 2 * side ** 3 / statistics.median(interleave({"": lambda: a @ b}, 7)[""])


def convolution_rate(device: str) -> float:
    """FLOP/s of one channels-last 3D convolution as in the middle of the decoder."""
    x = torch.randn(1, 192, 6, 96, 96).to(device).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(192, 192, 3, 3, 3).to(device).contiguous(memory_format=torch.channels_last_3d)
    seconds = statistics.median(interleave({"": lambda: F.conv3d(x, weight, padding=(0, 1, 1))}, 5)[""])
    return 2 * 27 * 192 * 192 * 4 * 96 * 96 / seconds


def show(options: argparse.Namespace, times: dict[str, list[float]], **facts: float) -> None:
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {"work": options.work, "dtype": options.dtype, "device": options.device, "threads": options.threads,
              "torch": torch.__version__,
              "seconds": {name: round(value, 3) for name, value in medians.items()},
              "all": {name: [round(value, 3) for value in values] for name, values in times.items()},
              "ours/diffusers": round(medians["ours"] / medians["diffusers"], 3)}
    if "flops" in facts:
        result["ours/limit"] = round(medians["ours"] * facts["limit"] / facts["flops"], 3)
    result["limit_gflops"] = round(facts.pop("limit") / 1e9, 1)
    print(json.dumps({**result, **facts}))


if __name__ == "__main__":
    main()
