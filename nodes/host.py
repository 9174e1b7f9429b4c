"""What the nodes need of ComfyUI: its folders, devices, memory manager, progress bar, previews and cancel button.

The only file that imports ComfyUI's modules. Where ComfyUI is absent, `Standalone` offers the same few methods on plain
folders, so that node classes also run in tests and scripts. Nodes call `HOST` and never ask which of the two it is.

Memory: ComfyUI's manager keeps a list of models that it may unload when something else needs the room. It sees each of
ours as an empty module with a declared size (`ManagedPlacement`), because the master of every weight is its mapped
file: taking a model off the device means to drop it, and nothing is copied back. Reference: ComfyUI's
`comfy/model_management.py` (`load_models_gpu`) and `comfy/patcher_extension.py` (`CallbacksMP`).
"""

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..wan_core import nano
from ..wan_core.memory import RESIDENT, Layout, OneAtATime, Placement
from ..wan_core.models import Model, Part, TextEncoder, VideoVAE, VisionEncoder
from ..wan_core.presets import VAESpec
from . import previews

try:
    import comfy.latent_formats
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.utils
    import folder_paths
    import latent_preview
    from comfy.cli_args import args as comfy_arguments
    from comfy.patcher_extension import CallbacksMP
except ModuleNotFoundError as missing:
    # A folder named "comfy" (one of tests, say) does not make ComfyUI; what ComfyUI itself lacks is its own error.
    if missing.name.partition(".")[0] not in ("comfy", "folder_paths", "latent_preview"):
        raise
    folder_paths = None

log = logging.getLogger(__name__)

BUNDLED = {
    "diffusion_models": (*nano.TRANSFORMERS, nano.VACE_MODULE),
    "text_encoders": (nano.TEXT_ENCODER,),
    "vae": (nano.VAE, nano.VAE22, nano.TINY_VAE),
    "clip_vision": (nano.CLIP_VISION,),
    "loras": (),
}

# How names of model files end. The core's lists do not have the latter, of formats and layouts that it does not read.
SUFFIXES = (".safetensors", ".sft", ".pth", ".pt", ".bin")
MORE_SUFFIXES = MappingProxyType(dict.fromkeys(("diffusion_models", "text_encoders"),
                                               (".gguf", ".safetensors.index.json")))

Handle = TypeVar("Handle", Model, TextEncoder, VisionEncoder, VideoVAE)
Preview = tuple | None
Advance = Callable[..., None]


@dataclass(frozen=True)
class SaveTarget:
    """A file to be written, and how ComfyUI's page finds it again."""

    path: Path
    entry: dict[str, str]


def bundled_file(folder: str, name: str) -> Path | None:
    """The bundled nano file that a list shows as `name`, None if it is another file."""
    return next((path for path in BUNDLED.get(folder, ()) if name == f"nano/{path.name}"), None)


class Standalone:
    """Plain folders under the working directory: models/<folder>, output."""

    def model_names(self, folder: str) -> list[str]:
        """Names for a list widget: the bundled nano models, then the files of the folder ('vae', say), and behind
        the VAEs those for previews."""
        names = [f"nano/{path.name}" for path in BUNDLED[folder]] + self._files(folder)
        return names + [f"{previews.FOLDER}/{name}" for name in self._preview_vaes() if folder == "vae"]

    def model_path(self, folder: str, name: str) -> Path:
        """The file behind a name of `model_names`. Raises ValueError if there is none."""
        if folder == "vae" and name.startswith(f"{previews.FOLDER}/"):
            folder, name = name.split("/", 1)
        path = bundled_file(folder, name) or self._find(folder, name)
        if path is None or not path.is_file():
            raise ValueError(f"there is no {name!r} among the model files in {folder!r}. Put it there, "
                             "or choose another one from the list.")
        return path

    def fingerprint(self, folder: str, *names: str) -> str:
        """Changes when one of the files is replaced: ComfyUI's key for outputs made from them."""
        try:
            states = [self.model_path(folder, name).stat() for name in names]
        except (OSError, ValueError):
            return "missing"
        return " ".join(f"{state.st_mtime_ns}-{state.st_size}" for state in states)

    def placement(self, kind: str) -> Placement:
        """Where a 'transformer', 'text_encoder', 'clip_vision' or 'vae' lives.

        There is one for each handle, shared by its changed copies.
        """
        return OneAtATime()

    def with_room(self, handle: Handle, nbytes: int) -> Handle:
        """A copy of `handle` for one run, which asks for `nbytes` on its device beside the weights."""
        return handle

    def result_device(self) -> torch.device:
        """Where results that go on to other nodes are kept."""
        return torch.device("cpu")

    def check_interrupt(self) -> None:
        """Raise if the user has pressed the cancel button."""

    def say(self, node_id: str | None, text: str) -> None:
        """Tell the user what a node found, in the log and, where there is a page, in the node."""
        log.info("Wan: %s", text)

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[Advance]:
        """Gives a callable that says how many of `total` are done, or one more, with a preview if there is one."""
        with tqdm(total=total, desc=what) as bar:
            yield lambda done=None, preview=None: bar.update(1 if done is None else done - bar.n)

    def previewer(self, spec: VAESpec, device: torch.device) -> Callable[[Tensor], Preview] | None:
        """Turns normalised latents [B, C, T, H, W] of a VAE into a preview; None if the user wants no previews."""
        return None

    def save_target(self, prefix: str, suffix: str, width: int, height: int) -> SaveTarget:
        """The next free file name for `prefix`, which may name subfolders of the output folder, and no others.

        %width% and %height% in it stand for the size of the video.
        """
        output = Path("output").resolve()
        target = (output / prefix.replace("%width%", str(width)).replace("%height%", str(height))).resolve()
        if output not in target.parents:
            raise ValueError(f"filename_prefix {prefix!r} leads out of the output folder; use a name inside it.")
        target.parent.mkdir(parents=True, exist_ok=True)
        pattern = re.compile(re.escape(target.name) + r"_(\d+)_\..*")
        used = [int(match[1]) for file in target.parent.iterdir() if (match := pattern.fullmatch(file.name))]
        name = f"{target.name}_{max(used, default=0) + 1:05}_{suffix}"
        subfolder = target.parent.relative_to(output).as_posix()
        return SaveTarget(target.parent / name, {"filename": name, "subfolder": subfolder, "type": "output"})

    def user_folder(self, name: str) -> Path:
        """A folder of the user's own, which is not emptied when the program starts again."""
        return Path("output", name)

    def stores_workflows(self) -> bool:
        """Whether saved files may hold the graph that made them."""
        return True

    def _files(self, folder: str) -> list[str]:
        root = Path("models", folder)
        endings = (*SUFFIXES, *MORE_SUFFIXES.get(folder, ()))
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*")
                      if path.name.lower().endswith(endings))

    def _preview_vaes(self) -> list[str]:
        return previews.for_wan(self._files(previews.FOLDER))

    def _find(self, folder: str, name: str) -> Path | None:
        root = Path("models", folder).resolve()
        path = (root / name).resolve()
        return path if root in path.parents else None


@dataclass(frozen=True)
class _Listing:
    """Names in the folders `roots`, as long as each of `folders`, path -> time of its last change, stays as it was."""

    roots: tuple[str, ...]
    folders: dict[str, float]
    names: list[str]

    def is_valid(self, roots: tuple[str, ...]) -> bool:
        try:
            return roots == self.roots and all(os.path.getmtime(path) == time for path, time in self.folders.items())
        except OSError:
            return False


class ComfyUI(Standalone):
    """The running ComfyUI."""

    def __init__(self) -> None:
        self._listings: dict[str, _Listing] = {}

    def placement(self, kind: str) -> Placement:
        device, offload_device = {
            "transformer": (management.get_torch_device, management.unet_offload_device),
            "text_encoder": (management.text_encoder_device, management.text_encoder_offload_device),
            # The core keeps CLIP vision models where it keeps text encoders.
            "clip_vision": (management.text_encoder_device, management.text_encoder_offload_device),
            "vae": (management.vae_device, management.vae_offload_device),
        }[kind]
        return ManagedPlacement.on(device(), offload_device())

    def with_room(self, handle: Handle, nbytes: int) -> Handle:
        if not isinstance(handle.placement, ManagedPlacement):
            return handle
        return replace(handle, placement=replace(handle.placement, room=nbytes, run=object()))

    def result_device(self) -> torch.device:
        return management.intermediate_device()

    def check_interrupt(self) -> None:
        management.throw_exception_if_processing_interrupted()

    def say(self, node_id: str | None, text: str) -> None:
        super().say(node_id, text)
        # ComfyUI's nodes can be run without its server, whose module then cannot even be imported.
        page = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        if page is not None and node_id is not None:
            page.send_progress_text(text, node_id, page.client_id)

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[Advance]:
        page = comfy.utils.ProgressBar(total)
        with super().progress(total, what) as count:
            def advance(done: int | None = None, preview: Preview = None) -> None:
                count(done)
                page.update_absolute(page.current + 1 if done is None else done, preview=preview)

            yield advance

    def previewer(self, spec: VAESpec, device: torch.device) -> Callable[[Tensor], Preview] | None:
        method = comfy_arguments.preview_method
        if method == latent_preview.LatentPreviewMethod.NoPreviews:
            return None
        # Who has chosen the core's rough colours gets them.
        rough = method == latent_preview.LatentPreviewMethod.Latent2RGB and spec not in previews.NANO_PREVIEWS
        found = [] if rough else [self._find(previews.FOLDER, name) for name in self._preview_vaes()]
        picture = previews.picture_of(spec, [file for file in found if file], device)
        if picture is not None:
            return lambda clean: ("JPEG", latent_preview.preview_to_image(picture(clean)), comfy_arguments.preview_size)
        formats = {"wan21": comfy.latent_formats.Wan21, "wan22": comfy.latent_formats.Wan22}
        previewer = latent_preview.get_previewer(device, formats[spec.kind]())
        return previewer and (lambda clean: previewer.decode_latent_to_preview_image("JPEG", clean))

    def save_target(self, prefix: str, suffix: str, width: int, height: int) -> SaveTarget:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory(), width, height)
        name = f"{name}_{counter:05}_{suffix}"
        return SaveTarget(Path(folder, name), {"filename": name, "subfolder": subfolder, "type": "output"})

    def user_folder(self, name: str) -> Path:
        # ComfyUI empties its temp folder whenever it starts.
        return Path(folder_paths.get_user_directory(), name)

    def stores_workflows(self) -> bool:
        return not comfy_arguments.disable_metadata

    def _files(self, folder: str) -> list[str]:
        return sorted({*folder_paths.get_filename_list(folder), *self._more_files(folder)})

    def _more_files(self, folder: str) -> list[str]:
        """Names that end in `MORE_SUFFIXES`, found and remembered as the core does it for its own lists."""
        endings = MORE_SUFFIXES.get(folder)
        if endings is None:
            return []
        roots = tuple(root for root in folder_paths.get_folder_paths(folder) if os.path.isdir(root))
        held = self._listings.get(folder)
        if held is None or not held.is_valid(roots):
            names, folders = [], {}
            for root in roots:
                found, inside = folder_paths.recursive_search(root, excluded_dir_names=[".git"])
                names += [name for name in found if name.lower().endswith(endings)]
                folders |= inside
            held = self._listings[folder] = _Listing(roots, folders, names)
        return held.names

    def _find(self, folder: str, name: str) -> Path | None:
        path = folder_paths.get_full_path(folder, name)
        return None if path is None else Path(path)


class WanWeights(nn.Module):
    """Stands for a checkpoint in the list of ComfyUI's memory manager; it has no weights of its own."""


@dataclass
class _Tenant:
    """What is placed, and its entry with the manager, which refers to it only weakly.

    The manager's entry knows `weights` and nothing else of ours: a cycle would keep dropped weights alive.
    """

    weights: OneAtATime
    part: Part | None = None
    key: tuple = ()
    size: int = 0
    patcher: object = None
    run: object = None


@dataclass(frozen=True, eq=False)
class ManagedPlacement:
    """One checkpoint at a time on a device, in room that ComfyUI's manager makes and may take back.

    `room` is what a run needs beside the weights, in bytes. Copies for other runs share what is placed. The manager is
    asked once in a run for each part: nothing is unloaded while a node runs, and asking costs a round of its
    housekeeping.
    """

    device: torch.device
    offload_device: torch.device
    tenant: _Tenant
    room: int = 0
    run: object = None

    @classmethod
    def on(cls, device: torch.device, offload_device: torch.device) -> "ManagedPlacement":
        return cls(device, offload_device, _Tenant(OneAtATime(device)))

    def budget(self, wanted: int) -> int | None:
        """See `Placement.budget`. Models of others are unloaded where that makes the room that is wanted."""
        if self.device.type == "cpu":
            return None
        own = self.tenant.weights.nbytes
        kept = [entry for entry in management.current_loaded_models if entry.model is self.tenant.patcher]
        management.free_memory(wanted - own + management.extra_reserved_memory(), self.device, keep_loaded=kept)
        return int(management.get_free_memory(self.device)) + own - management.extra_reserved_memory()

    @property
    def nbytes(self) -> int:
        """See `Placement.nbytes`."""
        return self.tenant.weights.nbytes

    def layout_of(self, part: Part) -> Layout | None:
        """See `Placement.layout_of`."""
        return self.tenant.weights.layout_of(part)

    def place(self, part: Part, dtype: torch.dtype, layout: Layout = RESIDENT) -> nn.Module:
        """See `Placement.place`."""
        tenant, key = self.tenant, (dtype, layout)
        if tenant.part is not part or tenant.key != key:
            self._register(part, dtype, layout)
        elif tenant.weights.holds(part, dtype, layout) and self.run is not None and self.run is tenant.run:
            return tenant.weights.place(part, dtype, layout)
        management.load_models_gpu([tenant.patcher], memory_required=self.room, force_full_load=True)
        tenant.run = self.run
        if not tenant.weights.holds(part, dtype, layout):
            log.info("Wan: reading %s to %s as %s", part.label, self.device, str(dtype).removeprefix("torch."))
        try:
            return tenant.weights.place(part, dtype, layout)
        except BaseException:
            self.clear()
            raise

    def expect(self, part: Part, dtype: torch.dtype, layout: Layout, prepare: Callable[[nn.Module], None]) -> None:
        """See `Placement.expect`."""
        self.tenant.weights.expect(part, dtype, layout, prepare)

    def changed(self) -> None:
        """See `Placement.changed`."""
        self.tenant.weights.changed()

    def clear(self) -> None:
        """See `Placement.clear`."""
        self.tenant.weights.clear()
        self.tenant.part = self.tenant.patcher = self.tenant.run = None

    def _register(self, part: Part, dtype: torch.dtype, layout: Layout) -> None:
        """Make the part the tenant, with an entry of its own unless it takes turns with one in the same slots."""
        tenant, size = self.tenant, part.resident_size(dtype, layout)
        if not layout.swapped or tenant.patcher is None or (tenant.key, tenant.size) != ((dtype, layout), size):
            self.clear()
            tenant.patcher = comfy.model_patcher.ModelPatcher(WanWeights(), self.device, self.offload_device, size=size)
            tenant.patcher.add_callback(CallbacksMP.ON_DETACH, _Drop(tenant.weights))
        tenant.part, tenant.key, tenant.size = part, (dtype, layout), size


@dataclass(frozen=True, eq=False)
class _Drop:
    """What the manager calls to take the model off the device, or with False only to list it anew."""

    weights: OneAtATime

    def __call__(self, patcher: object, unpatch_all: bool) -> None:
        if unpatch_all:
            self.weights.clear()


HOST = Standalone() if folder_paths is None else ComfyUI()
