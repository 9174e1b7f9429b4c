"""Streaming: pieces equal the whole, memory does not grow with the clip, finished frames are handed on at once."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.vae.small import SMALL, random_latents, random_vae, random_video
from wan_core.vae import WanVAE
from wan_core.vae.layers import Stream
from wan_core.vae.streaming import _tuned_convolutions


@pytest.fixture(scope="module", params=SMALL)
def vae(request):
    return random_vae(SMALL[request.param])


@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5), (2, 5), (1, 5), (3, 4, 5)])
def test_decoded_pieces_equal_the_whole(vae, cuts):
    """A clip decoded in pieces of any number of latent frames, the official one by one among them, is the same."""
    latents = random_latents(vae.spec, 5, 3, 4)
    whole = vae.decode_piece(latents, Stream(whole=True))
    stream, pieces = Stream(), []
    for start, stop in zip((0, *cuts), cuts):
        pieces.append(vae.decode_piece(latents[:, :, start:stop], stream))
        assert pieces[-1].shape[2] == 4 * (stop - start) - (3 if start == 0 else 0)
    torch.testing.assert_close(torch.cat(pieces, 2), whole, atol=1e-5, rtol=0)
    assert whole.abs().mean() > 0.05 and whole.diff(dim=2).abs().mean() > 1e-3
    torch.testing.assert_close(vae.decode(latents), whole.clamp(-1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cuts", [(1, 5, 9, 13, 17), (5, 17), (1, 17), (9, 13, 17)])
def test_encoded_pieces_equal_the_whole(vae, cuts):
    """A clip encoded in pieces, the first of 4n + 1 and later ones of 4n frames, has the same latents."""
    video = random_video(vae.spec, 17, 3, 2)
    whole = vae.encode_piece(video, Stream(whole=True))
    stream = Stream()
    pieces = [vae.encode_piece(video[:, :, start:stop], stream) for start, stop in zip((0, *cuts), cuts)]
    torch.testing.assert_close(torch.cat(pieces, 2), whole, atol=1e-5, rtol=0)
    assert whole.diff(dim=2).abs().mean() > 1e-3
    torch.testing.assert_close(vae.encode(video), whole, atol=1e-5, rtol=0)


def test_first_frame_has_a_latent_of_its_own(vae):
    """The latent of a single frame is the first latent of every clip that begins with it; so for decoded frames."""
    video, latents = random_video(vae.spec, 13, 2, 2), random_latents(vae.spec, 4, 2, 2)
    torch.testing.assert_close(vae.encode(video[:, :, :1]), vae.encode(video)[:, :, :1], atol=1e-5, rtol=0)
    torch.testing.assert_close(vae.decode(latents[:, :, :1]), vae.decode(latents)[:, :, :1], atol=1e-5, rtol=0)


def test_nothing_looks_ahead(vae):
    """Changing the last latent frame changes the last four frames and no earlier one."""
    latents = random_latents(vae.spec, 3, 2, 2)
    changed = latents.clone()
    changed[:, :, 2] += 1
    before, after = vae.decode(latents), vae.decode(changed)
    torch.testing.assert_close(before[:, :, :5], after[:, :, :5], atol=1e-6, rtol=0)
    assert (before[:, :, 5:] - after[:, :, 5:]).abs().amax((0, 1, 3, 4)).min() > 1e-3


def test_clips_of_a_batch_and_of_two_runs_do_not_mix(vae):
    """Each clip of a batch equals its run alone, though the same module ran another clip in between."""
    latents = random_latents(vae.spec, 3, 2, 3, batch=2)
    together = vae.decode(latents)
    for i in range(2):
        torch.testing.assert_close(vae.decode(latents[i:i + 1]), together[i:i + 1], atol=1e-5, rtol=0)
    streams, pieces = [Stream(), Stream()], [[], []]
    for index in range(3):
        for i in range(2):
            pieces[i].append(vae.decode_piece(latents[i:i + 1, :, index:index + 1], streams[i]))
    torch.testing.assert_close(torch.cat([torch.cat(p, 2) for p in pieces]).clamp(-1, 1), together, atol=1e-5, rtol=0)


def test_frames_are_handed_on_as_they_become_final(vae):
    """on_frames comes after each latent frame, with frames that never change afterwards; later ones are untouched."""
    latents, seen = random_latents(vae.spec, 4, 2, 3), []
    whole = vae.decode(latents)
    out = torch.full_like(whole, torch.nan)

    def check(start, stop):
        seen.append((start, stop))
        assert torch.equal(out[:, :, :stop], whole[:, :, :stop])
        assert out[:, :, stop:].isnan().all()

    result = vae.decode(latents, out=out, on_frames=check)
    assert seen == [(0, 1), (1, 5), (5, 9), (9, 13)]
    assert result.data_ptr() == out.data_ptr()


def test_decoding_is_lazy_as_a_generator(vae):
    """decode_pieces decodes one latent frame at a time, when it is asked to, and can be left in the middle."""
    latents = random_latents(vae.spec, 4, 2, 3)
    whole = vae.decode(latents)
    out = torch.full_like(whole, torch.nan)
    pieces = vae.decode_pieces(latents, out)
    assert out.isnan().all()
    assert next(pieces) == (0, 1) and next(pieces) == (1, 5)
    pieces.close()
    assert torch.equal(out[:, :, :5], whole[:, :, :5]) and out[:, :, 5:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_frames_are_written_into_the_given_buffer(vae, dtype):
    """Any buffer of the right shape is filled, also a view of ComfyUI's [F, H, W, C] layout or of half precision."""
    latents = random_latents(vae.spec, 3, 2, 3)
    stride = vae.spec.spatial_stride
    images = torch.full((9, 2 * stride, 3 * stride, 3), torch.nan, dtype=dtype)
    out = images.permute(3, 0, 1, 2).unsqueeze(0)
    assert vae.decode(latents, out=out).data_ptr() == images.data_ptr()
    torch.testing.assert_close(images.float(), vae.decode(latents)[0].permute(1, 2, 3, 0),
                               atol=1e-6 if dtype == torch.float32 else 1e-3, rtol=0)


class Interrupted(Exception):
    """Raised by the callables below."""


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_on_piece_can_stop(vae, method):
    """on_piece comes after every piece, and what it raises ends the run there."""
    argument = random_video(vae.spec, 13, 2, 2) if method == "encode" else random_latents(vae.spec, 4, 2, 2)
    seen = []
    getattr(vae, method)(argument, on_piece=lambda: seen.append(None))
    assert len(seen) == 4

    def stop():
        seen.append(None)
        if len(seen) == 2:
            raise Interrupted

    seen.clear()
    with pytest.raises(Interrupted):
        getattr(vae, method)(argument, on_piece=stop)
    assert len(seen) == 2


class LiveBytes(TorchDispatchMode):
    """The most bytes that were alive at once, of the tensors made while it is active."""

    def __init__(self, *known):
        super().__init__()
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """Bytes that are alive at this moment."""
        self._live = {key: value for key, value in self._live.items() if not value[0].expired()}
        return sum(nbytes for _, nbytes in self._live.values())


def peak_bytes(run, *known, parameters=()):
    with LiveBytes(*known, *parameters) as live:
        run()
    return live.peak


def test_memory_does_not_grow_with_the_length_of_the_clip(vae):
    """65 frames take no more memory than 17, but for the clip itself, whichever way it goes through the VAE."""
    peaks = {}
    for frames in (17, 65):
        latents, video = random_latents(vae.spec, 1 + frames // 4, 3, 3), random_video(vae.spec, frames, 3, 3)
        out = torch.empty_like(video)
        peaks[frames] = [
            peak_bytes(lambda: vae.decode(latents, out=out), latents, out, parameters=vae.parameters()),
            peak_bytes(lambda: vae.decode(latents), latents, parameters=vae.parameters()) - video.nbytes,
            peak_bytes(lambda: vae.encode(video), video, parameters=vae.parameters()) - latents.nbytes]
    assert peaks[65] == peaks[17]
    assert min(peaks[17]) > 0 and peaks[17][0] == peaks[17][1]


def test_a_stream_remembers_frames_and_not_pieces(vae):
    """What is kept between pieces is the same after pieces of one and of four latent frames."""
    kept = []
    for length in (1, 4):
        latents, stream = random_latents(vae.spec, 1 + length, 3, 3), Stream()
        with LiveBytes(latents, *vae.parameters()) as live:
            vae.decode_piece(latents[:, :, :1], stream)
            vae.decode_piece(latents[:, :, 1:], stream)
        kept.append(live.now())
    assert kept[0] == kept[1] > 0


def test_the_measure_of_memory_sees_a_whole_clip(vae):
    """The same measurement on a clip that is decoded as one piece does grow, by about the frames' ratio."""
    peaks = [peak_bytes(lambda: vae.decode_piece(latents, Stream(whole=True)), latents, parameters=vae.parameters())
             for latents in (random_latents(vae.spec, 5, 3, 3), random_latents(vae.spec, 17, 3, 3))]
    assert peaks[1] > 2.5 * peaks[0]


def test_wide_layers_take_several_latent_frames_together(vae):
    """Small pictures pass the wide layers four latent frames at a time, large ones one by one, with the same result."""
    assert [vae.at_once(side, side) for side in (3, 64, 600)] == [4, 4, 1]
    released = WanVAE.at_once
    latents, video = random_latents(vae.spec, 8, 2, 3), random_video(vae.spec, 29, 2, 3)
    together = vae.decode(latents), vae.encode(video)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanVAE, "at_once", lambda self, height, width: min(1, released(self, height, width)))
        alone = vae.decode(latents), vae.encode(video)
    for ours, expected in zip(together, alone):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_tuning_of_convolutions_is_given_back(monkeypatch):
    """cuDNN's setting is changed for a piece of work and is afterwards as it was, whatever happens in between."""
    for before in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
        with pytest.raises(Interrupted), _tuned_convolutions():
            assert torch.backends.cudnn.benchmark
            raise Interrupted
        assert torch.backends.cudnn.benchmark is before


def test_kernels_off_the_cpu_are_in_the_order_of_pictures(vae):
    """On another device every kernel becomes channels-last; on a CPU the weights stay the tensors that they are."""
    before = {name: parameter.data_ptr() for name, parameter in vae.named_parameters()}
    assert {name: parameter.data_ptr() for name, parameter in vae.arranged().named_parameters()} == before
    with torch.device("meta"):
        other = WanVAE(vae.spec).arranged()
    orders = {4: torch.channels_last, 5: torch.channels_last_3d}
    assert all(p.is_contiguous(memory_format=orders[p.ndim]) for p in other.parameters() if p.ndim in orders)
    assert any(not p.is_contiguous() for p in other.parameters())
