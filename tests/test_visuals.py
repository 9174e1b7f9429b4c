"""Pictures given with a prompt from Python: what is refused, before anything is loaded, and what is done without."""

from dataclasses import replace

import pytest
import torch

from tests.small_models import SMALL, write_clip_vision, write_transformer, write_vae
from wan_core.memory import OneAtATime
from wan_core.models import Model, Part, load_clip_vision, load_text_encoder, load_vae
from wan_core.pipeline import generate
from wan_core.presets import PRESETS, TRANSFORMERS
from wan_core.visuals import Visuals

SIZE = {"width": 32, "height": 32, "frames": 5, "steps": 1}


class NoModel(OneAtATime):
    """A place in which nothing may be put."""

    def place(self, part, dtype):
        pytest.fail(f"{part.label} was loaded")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of every type of model with random weights."""
    folder = tmp_path_factory.mktemp("models")
    for name, spec in {**SMALL, "nano_i2v": TRANSFORMERS["nano_i2v"]}.items():
        write_transformer(folder / name, spec=spec)
    write_vae(folder / "vae")
    write_vae(folder / "vae22", name="nano_vae22")
    write_clip_vision(folder / "clip_vision")
    return folder


@pytest.fixture
def run(folder, files):
    """Makes a clip with the model of this name; `place` is where its parts are loaded to."""
    def make(name, visuals=None, place=None, vae=None, clip_vision=False, **changes):
        place = place or OneAtATime("cpu")
        part = Part.open(folder / name, "transformer")
        family = "22" if name == "ti2v" else ""
        model = Model(part, part, replace(PRESETS["nano_t2v"], title=f"Small {name.upper()}", vae=f"nano_vae{family}"),
                      place)
        clip = load_clip_vision(folder / "clip_vision", placement=place) if clip_vision else None
        return generate("a red circle", model=model, vae=load_vae(folder / (vae or f"vae{family}"), placement=place),
                        text_encoder=load_text_encoder(files.text_encoder, placement=place), clip_vision=clip,
                        visuals=visuals, **{**SIZE, "guidance": 1.0, **changes}).frames

    return make


def pictures(count=1, height=32, width=32, seed=0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("given", "message"), [
    ([pictures()[0]], r"is a list; expected a floating-point tensor \[frames, 3, height, width\] with values from -1"),
    ([], "is a list"),
    (pictures().numpy(), "is a ndarray"),
    ("picture.png", "is a str"),
    (pictures()[0], r"has shape \[3, 32, 32\]; expected"),
    (pictures().movedim(1, -1), r"has shape \[1, 32, 32, 3\]"),
    (torch.zeros(1, 4, 32, 32), r"has shape \[1, 4, 32, 32\]"),
    (torch.zeros(1, 1, 32, 32), r"has shape \[1, 1, 32, 32\]"),
    (torch.zeros(0, 3, 32, 32), r"has shape \[0, 3, 32, 32\]"),
    (torch.zeros(1, 3, 0, 32), r"has shape \[1, 3, 0, 32\]"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "holds uint8; expected a floating-point tensor"),
    (pictures() * 255, "holds values from -25.* expected numbers from -1 to 1"),
    (pictures() * torch.nan, "holds values from nan to nan"),
    (pictures() + torch.inf, "holds values from inf"),
])
@pytest.mark.parametrize("name", ["start", "end", "control", "references", "video"])
def test_pictures_that_are_none(name, given, message):
    """Whatever it is given for: another type, shape or range is an error that shows it."""
    with pytest.raises(ValueError, match=f"{name} {message}"):
        Visuals(**{name: given})


@pytest.mark.parametrize(("mask", "message"), [
    (pictures(), r"mask has shape \[1, 3, 32, 32\]; expected a floating-point tensor \[frames, 1, height, width\]"),
    (torch.ones(32, 32), r"mask has shape \[32, 32\]"),
    (torch.full((1, 1, 32, 32), 255, dtype=torch.uint8), "mask holds values from 255 to 255; expected .* from 0 to 1"),
    (torch.full((1, 1, 32, 32), -1.0), "mask holds values from -1 to -1"),
    (torch.full((1, 1, 32, 32), torch.nan), "mask holds values from nan"),
])
def test_masks_that_are_none(mask, message):
    """The same for masks, whose values go from 0 to 1."""
    with pytest.raises(ValueError, match=message):
        Visuals(control=pictures(5), mask=mask)


def test_unknown_ways_to_fit():
    """A word that is none is an error even where nothing has to be fitted."""
    with pytest.raises(ValueError, match="unknown way to fit a picture 'fill'; choose one of crop, stretch"):
        Visuals(how="fill")


@pytest.mark.parametrize(("model", "visuals", "message"), [
    ("t2v", {"start": pictures()}, "Small T2V takes no start image; models of type i2v, flf2v, ti2v do"),
    ("t2v", {"end": pictures()}, "takes no end image; models of type i2v, flf2v do"),
    ("t2v", {"control": pictures(5)}, "takes no control video; models of type vace do"),
    ("i2v", {"references": pictures()}, "takes no reference image; models of type vace do"),
    ("ti2v", {"end": pictures()}, "takes no end image"),
    ("vace", {"start": pictures()}, "takes no start image"),
    ("i2v", {"start": pictures(4), "end": pictures(2)}, "4 start and 2 end frames do not fit into a clip of 5 frames"),
    ("i2v", {"end": pictures(6)}, "6 end frames do not fit into a clip of 5 frames. Make the clip longer, or give"),
    ("ti2v", {"start": pictures(6)}, "6 start frames do not fit into a clip of 5 frames"),
    ("vace", {"mask": torch.ones(1, 1, 32, 32)}, "a control mask was given without the control video"),
    ("t2v", {"video": pictures(3), "denoise": 0.5}, "has 3 frames, and 5 are to be made; make fewer"),
    ("t2v", {"video": pictures(5), "denoise": 0.0}, "denoise must be greater than 0"),
    ("t2v", {"denoise": 0.5}, "there is no video to keep a part of"),
])
def test_pictures_that_do_not_suit_the_model(run, model, visuals, message):
    """Pictures for a model that takes none, or without room in the clip: refused before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        run(model, Visuals(**visuals), NoModel("cpu"))


@pytest.mark.parametrize(("model", "changes", "message"), [
    ("ti2v", {"vae": "vae"}, r"vae \(nano_vae\) is not the VAE that Small TI2V was trained with. Use nano_vae22"),
    ("t2v", {"vae": "vae22"}, r"vae22 \(nano_vae22\) is not the VAE that Small T2V was trained with. Use nano_vae\."),
    ("i2v", {"clip_vision": True}, "gives features of width 64; Small I2V takes no CLIP vision features. Leave it"),
    ("t2v", {"clip_vision": True}, "Small T2V takes no CLIP vision features"),
    ("ti2v", {"width": 48}, "width is 48 pixels; it must be a multiple of 32. Use 64"),
])
def test_parts_that_do_not_suit_the_model(run, model, changes, message):
    """The VAE of another family and a CLIP vision model where none is taken: refused before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        run(model, None, NoModel("cpu"), **changes)


def test_a_model_without_its_picture_or_clip_features(run, caplog):
    """A model that takes pictures runs without, and a VACE model without control; the log says what happens."""
    assert run("nano_i2v", Visuals(start=pictures())).shape == (5, 32, 32, 3)
    assert "Small NANO_I2V is given no CLIP vision features; its attention to the picture is left out" in caplog.text
    assert "no start or end image" not in caplog.text
    run("i2v")
    assert "Small I2V is given no start or end image; it makes one up" in caplog.text
    with caplog.at_level("INFO"):
        run("vace")
    assert "Small VACE is given no VACE control; it works as the text-to-video model" in caplog.text


def test_controls_and_masks_of_other_lengths_and_sizes(run):
    """Surplus control frames are left away, missing ones are free (grey), and so are frames without a mask; a mask of
    another size is fitted, a boolean one taken, one of a single frame holds for all."""
    whole, mask = pictures(5), torch.ones(5, 1, 32, 32)
    mask[:3, :, :, :16] = 0
    assert torch.equal(run("vace", Visuals(control=torch.cat([whole, pictures(4, seed=1)]))),
                       run("vace", Visuals(control=whole)))
    grey = torch.cat([whole[:2], torch.zeros(3, 3, 32, 32)])
    assert torch.equal(run("vace", Visuals(control=whole[:2])), run("vace", Visuals(control=grey)))
    masked = run("vace", Visuals(control=whole, mask=mask))
    assert torch.equal(run("vace", Visuals(control=whole, mask=mask[:3].bool())), masked)
    single = [run("vace", Visuals(control=whole, mask=one)) for one in (
        mask[:1], mask[:1].expand(5, -1, -1, -1), mask[:1].repeat_interleave(2, 2).repeat_interleave(2, 3))]
    assert torch.equal(single[0], single[1])
    assert (single[0].int() - single[2].int()).abs().max() <= 40 and not torch.equal(single[0], masked)


def test_pictures_of_two_sizes_and_in_half_precision(run):
    """Start and end image may differ in size from the clip and from each other, and be float16."""
    given = Visuals(start=pictures(1, 40, 50).half(), end=pictures(1, 80, 30))
    assert run("nano_i2v", given, clip_vision=True).shape == (5, 32, 32, 3)
