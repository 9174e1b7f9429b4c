"""The text encoder: a prompt of the usual length to the embedding that the transformer takes.

Ours computes in float32 from weights that stay in bfloat16, and only the tokens that the prompt has. diffusers'
pipeline fills the prompt up to 512 tokens, in bfloat16; "transformers" is the same encoder on the prompt's tokens in
float32.
"""

from collections.abc import Callable

import torch

from benchmarks import peers
from benchmarks.cases.bench import PROMPT_TOKENS, Bench
from benchmarks.limits import text_work
from benchmarks.shared import randomise
from wan_core.text import UMT5Encoder, encode_pieces


def encode(bench: Bench) -> None:
    """UMT5 on a prompt of 60 tokens, beside transformers."""
    spec, dtype, device = bench.scale.text, torch.bfloat16, bench.device
    case = f"text encoder, {spec.num_layers} layers of {spec.dim}, {PROMPT_TOKENS} tokens"
    if bench.is_late(case):
        return
    with torch.device(device):
        ours = randomise(UMT5Encoder(spec).to(dtype)).eval()
    pieces = torch.randint(2, spec.vocab_size, (PROMPT_TOKENS - 1,)).tolist()
    work = {"ours": lambda: encode_pieces(ours, [[(piece, 1.0) for piece in pieces]], spec.text_len)}
    if "transformers" in bench.peers:
        work |= bench.beside(case, ("transformers",), lambda _: theirs(bench, PROMPT_TOKENS, torch.float32))
        if "diffusers" in bench.peers:
            work |= bench.beside(case, ("diffusers",), lambda _: theirs(bench, spec.text_len, dtype))
    times = bench.times(case, work, 3)
    needed = text_work(spec, PROMPT_TOKENS)
    nbytes = sum(weight.nbytes for block in ours.blocks for weight in block.parameters())
    # A prompt is short: reading the weights can take longer than computing with them.
    limit = max(needed.total / bench.machine.matmul(torch.float32), nbytes / bench.machine.copy())
    bench.report.compare(case, times, limit, part="text", flops=needed.total, bytes=nbytes)


def theirs(bench: Bench, length: int, dtype: torch.dtype) -> Callable[[], object]:
    """The encoder of transformers on a prompt that is filled up to `length` tokens."""
    forward = peers.text_encoder(bench.scale.text, dtype, bench.device)
    ids = torch.randint(2, bench.scale.text.vocab_size, (1, length))
    mask = torch.zeros(1, length, dtype=torch.int64)
    mask[:, :PROMPT_TOKENS] = 1
    return lambda: forward(ids, mask)
