"""Pictures that cannot be used, at every node that takes one: refused by what came, before anything is encoded."""

from types import SimpleNamespace

import pytest
import torch


@pytest.mark.parametrize(("changes", "message"), [
    ({}, "neither a start nor an end image was given"),
    ({"start_image": torch.zeros(4, 32, 32, 3), "end_image": torch.zeros(2, 32, 32, 3)},
     "4 start and 2 end frames do not fit into a clip of 5 frames"),
    ({"end_image": torch.zeros(6, 32, 32, 3)}, "6 end frames do not fit into a clip of 5"),
    ({"start_image": torch.zeros(32, 32, 3)}, r"the image has shape \[32, 32, 3\]; expected pictures"),
    ({"start_image": torch.zeros(1, 32, 32, 1)}, "expected pictures"),
    ({"clip_vision": 1, "clip_vision_output": 1, "end_image": torch.zeros(1, 32, 32, 3)}, "connect one of them"),
    ({"width": 40}, "width is 40 pixels; it must be a multiple of 16"),
    ({"length": 6}, "frames is 6; it must be 4n"),
    ({"vae": SimpleNamespace(latent_channels=4)}, "the VAE has 4 latent channels.*Connect Wan VAE Loader"),
])
def test_image_to_video_refuses(call, nano, changes, message):
    """Promise: no picture, pictures without room or of an odd form, sizes off the grid, another VAE."""
    inputs = {"positive": nano["positive"], "negative": nano["negative"], "vae": nano["vae"], "width": 32, "height": 32,
              "length": 5, **changes}
    with pytest.raises(ValueError, match=message):
        call("WanCoreImageToVideo", **inputs)


IMAGES = [("WanCoreImageToVideo", "start_image"), ("WanCoreImageToVideo", "end_image"),
          ("WanCoreImageLatent", "start_image"), ("WanCoreVace", "control_video"), ("WanCoreVace", "reference_image"),
          ("WanCoreVideoSize", "image")]


@pytest.mark.parametrize(("node", "name"), IMAGES)
@pytest.mark.parametrize(("image", "message"), [
    (torch.zeros(1, 3, 32, 32), r"shape \[1, 3, 32, 32\]; expected pictures \[batch, height, width, 3\]"),
    (torch.zeros(1, 32, 32), "expected pictures"),
    (torch.zeros(1, 32, 32, 1), "expected pictures"),
    (torch.zeros(0, 32, 32, 3), "expected pictures"),
    (torch.zeros(1, 0, 32, 3), "expected pictures"),
    (torch.full((1, 32, 32, 3), torch.nan), "the image holds values from nan to nan; expected numbers from 0 to 1"),
    (torch.full((1, 32, 32, 3), torch.inf), "the image holds values from inf"),
    (torch.full((1, 32, 32, 3), 255.0), "the image holds values from 255 to 255"),
    (torch.zeros(1, 32, 32, 3, dtype=torch.uint8), "the image holds uint8; expected floating-point numbers from 0 to"),
])
def test_images_that_are_none(call, nano, node, name, image, message):
    """Promise: every IMAGE socket refuses other shapes, types and ranges, before anything is encoded."""
    inputs = {} if node == "WanCoreVideoSize" else {"vae": nano["vae"], "width": 32, "height": 32, "length": 5}
    if node in ("WanCoreImageToVideo", "WanCoreVace"):
        inputs |= {"positive": nano["positive"], "negative": nano["negative"]}
    with pytest.raises(ValueError, match=message):
        call(node, **inputs, **{name: image})


def test_clip_vision_refuses_the_same_images(listed):
    """Promise: so does the CLIP vision socket, for the core's nodes too."""
    encode = listed("clip_vision").encode_image
    for image, message in ((torch.zeros(0, 32, 32, 3), "expected pictures"), (torch.zeros(1, 3, 9, 9), "pictures"),
                           (torch.full((1, 32, 32, 3), torch.nan), "values from nan to nan")):
        with pytest.raises(ValueError, match=message):
            encode(image)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_other_precisions(call, nano, dtype):
    """Promise: an image with alpha in another precision and of another size gives what its colours in float32 do."""
    image = (torch.rand(1, 40, 48, 4, generator=torch.Generator().manual_seed(0)) * 16).round() / 16
    inputs = {"vae": nano["vae"], "width": 32, "height": 32, "length": 5}
    given, plain = (call("WanCoreImageLatent", **inputs, start_image=one)[0]["samples"]
                    for one in (image.to(dtype), image[..., :3]))
    torch.testing.assert_close(given, plain, atol=0.1, rtol=0)


@pytest.mark.parametrize(("node", "changes", "message"), [
    ("WanCoreImageLatent", {"start_image": torch.zeros(6, 32, 32, 3)}, "6 start frames do not fit into a clip of 5"),
    ("WanCoreImageLatent", {"start_image": torch.zeros(32, 32, 3)}, "expected pictures"),
    ("WanCoreImageLatent", {"height": 40}, "height is 40 pixels"),
    ("WanCoreVace", {"control_masks": torch.zeros(1, 5, 32, 32)}, r"the masks have shape \[1, 5, 32, 32\]"),
    ("WanCoreVace", {"control_masks": torch.zeros(0, 32, 32)}, r"the masks have shape \[0, 32, 32\]"),
    ("WanCoreVace", {"control_masks": torch.full((1, 32, 32), 255.0)}, "the mask holds values from 255 to 255"),
    ("WanCoreVace", {"control_masks": torch.full((1, 32, 32), torch.nan)}, "the mask holds values from nan to nan"),
    ("WanCoreVace", {"control_video": torch.zeros(5, 32, 32)}, "expected pictures"),
    ("WanCoreVace", {"reference_image": torch.zeros(1, 32, 32, 2)}, "expected pictures"),
    ("WanCoreVace", {"length": 4}, "frames is 4"),
    ("WanCoreVace", {"vae": SimpleNamespace(latent_channels=8)}, "the VAE has 8 latent channels"),
])
def test_latent_and_control_nodes_refuse(call, nano, node, changes, message):
    """Promise: what cannot be a start, a control or a mask is an error that shows its shape."""
    prompts = {} if node == "WanCoreImageLatent" else {"positive": nano["positive"], "negative": nano["negative"]}
    with pytest.raises(ValueError, match=message):
        call(node, **{"vae": nano["vae"], "width": 32, "height": 32, "length": 5, **prompts, **changes})


def test_sizes_need_a_picture(call):
    """Promise: a mask has no size to offer, and is refused by its shape."""
    with pytest.raises(ValueError, match=r"the image has shape \[1, 64, 64\]"):
        call("WanCoreVideoSize", image=torch.zeros(1, 64, 64))


def test_masks_without_a_control_video(call, nano, caplog):
    """Promise: as in the core, masks alone keep grey; the log says so. Masks may be boolean."""
    inputs = {"positive": nano["positive"], "negative": nano["negative"], "vae": nano["vae"], "width": 32, "height": 32,
              "length": 5, "control_masks": torch.zeros(1, 32, 32, dtype=torch.bool)}
    alone = call("WanCoreVace", **inputs)[0][0][1]
    assert "masks are given without a control video; what they keep is grey" in caplog.text
    grey = call("WanCoreVace", **inputs, control_video=torch.full((5, 32, 32, 3), 0.5))[0][0][1]
    assert torch.equal(alone["vace_frames"][0], grey["vace_frames"][0])
    assert torch.equal(alone["vace_mask"][0], torch.zeros(1, 64, 2, 4, 4))
