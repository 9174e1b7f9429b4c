"""What the goals for one H200 come to by arithmetic; nothing is measured.

A step's time is that of its matrix products, its attention and its passes over the tokens, one after the other, at
assumed rates: these are in every line. The products' rate is 0.90 of what a large square product reaches there (788
TFLOP/s in bfloat16 on random data; FP8 taken as twice that); attention's is what the authors of FlashAttention 3 and
SageAttention 2 publish for 128 channels a head and long sequences on an H100, which has the same processor.
"""

from dataclasses import dataclass

from benchmarks.cases.bench import SCALES, Bench
from benchmarks.limits import decoder_work, token_count, transformer_work
from wan_core.presets import TransformerSpec

BANDWIDTH = 4.0e12
# A third of the rate of products, for convolutions of 96 to 384 channels with all that is between them.
CONVOLUTIONS = 250e12


@dataclass(frozen=True)
class Rates:
    """Operations a second that are assumed, and for which goal's form."""

    form: str
    products: float
    attention: float


ASSUMED = (Rates("bfloat16", 0.90 * 788e12, 650e12), Rates("fp8", 0.90 * 1576e12, 650e12),
           Rates("fp8 sage", 0.90 * 1576e12, 880e12))


def goals(bench: Bench) -> None:
    """What the goals for an H200 are predicted to come to, and the attention rate that each needs."""
    full = SCALES["full"]
    for clip in full.clips:
        tokens = token_count(full.spec, clip.shape)
        work = transformer_work(full.spec, tokens) * full.passes
        passing = full.passes * token_bytes(full.spec, tokens) / BANDWIDTH
        for rates in ASSUMED:
            seconds = work.products / rates.products + work.attention / rates.attention + passing
            most = clip.goals.get(rates.form, {}).get("ours")
            facts = {"tflops_products": rates.products / 1e12, "tflops_attention": rates.attention / 1e12,
                     "s_products": work.products / rates.products, "s_attention": work.attention / rates.attention,
                     "s_passes": passing}
            if most:
                left = most - work.products / rates.products - passing
                facts["tflops_attention_needed"] = work.attention / left / 1e12
            bench.report.add(f"predicted, H200: step, {rates.form}, {clip.name}", "s", seconds,
                             (0, most) if most else None, **facts)
    decode = decoder_work(full.vaes["wan21_vae"], *full.video)
    bench.report.add("predicted, H200: wan21_vae decode, 81 frames 1280x720", "s", decode.total / CONVOLUTIONS,
                     (0, full.vae_goals["wan21_vae decode"]["ours"]), tflops=CONVOLUTIONS / 1e12,
                     pflop=decode.total / 1e15)


def token_bytes(spec: TransformerSpec, tokens: int) -> float:
    """Bytes that the operations between products read and write, as fused kernels do: in each block three norms of the
    float32 stream (6 bytes a number) and three residuals (10), norm and rotation of q and k and norm of the text's q in
    place in half precision (12), and GELU inside the product."""
    return spec.num_layers * tokens * spec.dim * (3 * 6 + 3 * 10 + 12.0)
