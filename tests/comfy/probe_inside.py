"""The pack and ComfyUI in one process: its memory manager with our placement, its conventions beside ours.

Run by ComfyUI's interpreter, through launcher.py: launcher.py probe_inside.py CHECKOUT PACK
Writes one line of JSON: {name of a fact: whether it holds}; test_inside.py says what each means.
"""
import importlib.util
import json
import sys
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path


def load_pack(checkout: str, pack: str) -> None:
    sys.path.insert(0, checkout)
    sys.argv = [f"{checkout}/main.py", "--cpu"]
    import comfy.options
    comfy.options.enable_args_parsing()
    import nodes  # noqa: F401 - the core's nodes, and with them torch and all of comfy

    spec = importlib.util.spec_from_file_location("the_pack", f"{pack}/__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["the_pack"] = module
    spec.loader.exec_module(module)


def placement_facts() -> dict[str, bool]:
    import comfy.model_management as management
    import torch
    from the_pack.nodes.host import HOST, ManagedPlacement
    from the_pack.wan_core.dit import ModelInputs
    from the_pack.wan_core.models import load_experts

    def listed() -> list[int]:
        return [entry.model.model_size() for entry in management.current_loaded_models]

    placement = HOST.placement("transformer")
    model = load_experts(placement=placement)
    found = {"is_managed": isinstance(placement, ManagedPlacement)}
    high = model.get("high")
    found["size_is_known"] = listed() == [sum(weight.nbytes for weight in high.state_dict().values())]
    run = HOST.with_room(model, 10**6)
    found["not_built_again"] = model.get("high") is run.get("high") is run.get("high") is high
    gone = weakref.ref(high)
    del high
    low = model.get("low")
    found["one_at_a_time"] = gone() is None and len(listed()) == 1
    gone = weakref.ref(low)
    del low
    management.unload_all_models()
    found["evicted"] = gone() is None and listed() == []
    again = run.get("low")
    text = again.prepare_text(torch.zeros(1, 1, 96))
    velocity = again(ModelInputs(torch.zeros(1, 16, 1, 2, 2), torch.zeros(1), text))
    found["comes_back"] = velocity.isfinite().all().item() and len(listed()) == 1
    gone = weakref.ref(again)
    del again, model, run, placement
    management.cleanup_models()
    found["gone_with_its_handle"] = gone() is None and listed() == []
    return found


def swap_facts() -> dict[str, bool]:
    import comfy.model_management as management
    import torch
    from the_pack.nodes.host import HOST
    from the_pack.wan_core.conditioning import TextCondition
    from the_pack.wan_core.memory import Layout, Plan
    from the_pack.wan_core.models import load_experts
    from the_pack.wan_core.pipeline import initial_noise, sample
    from the_pack.wan_core.sampling import Conditions, Guidance, make_schedule

    shape = (1, 16, 2, 4, 4)

    def run(model: object, on_step: object = None) -> torch.Tensor:
        prompts = [TextCondition(torch.full((1, 3, 96), value)) for value in (0.1, 0.2)]
        return sample(model, torch.zeros(shape), make_schedule("unipc", 4, 3.0),
                      Conditions(prompts[:1], prompts[1:]), Guidance(3.0, 3.0), noise=initial_noise(shape, 1),
                      on_step=on_step)

    expected = run(load_experts(placement=HOST.placement("transformer")))
    model = replace(load_experts(placement=HOST.placement("transformer")), plan=Plan(Layout(6, 2)))
    model = HOST.with_room(model, 10**6)
    sizes, entries = [], set()

    def look(step: object) -> None:
        sizes.append([entry.model.model_size() for entry in management.current_loaded_models][-1])
        entries.add(id(model.placement.tenant.patcher))

    found = {"swapped_run_is_the_same": torch.equal(run(model, look), expected)}
    slots = model.placement.tenant.weights._pool.slots
    blocks = sum(leaf.numel() * leaf.element_size() for leaf in model.get("low").blocks[0].parameters())
    found["counts_slots_and_not_blocks"] = len(slots) == 2 and set(sizes) == {
        model.low.resident_size(torch.float32, Layout(6, 2))} and sizes[0] < model.low.size(torch.float32) - 3 * blocks
    found["experts_share_an_entry"] = len(entries) == 1
    del slots

    def evict(step: object) -> None:
        if step.index == 1:
            management.unload_all_models()

    found["swapped_run_survives_unloading"] = torch.equal(run(HOST.with_room(model, 10**6), evict), expected)
    management.unload_all_models()
    found["slots_are_given_back"] = model.placement.tenant.weights.nbytes == 0 and not management.current_loaded_models
    return found


def agreement_facts() -> dict[str, bool]:
    import comfy.latent_formats
    import comfy.model_sampling
    import comfy.sample
    import torch
    from the_pack.nodes.conditioning import percent_to_sigma
    from the_pack.nodes.sampler import _exchanged, _noisy
    from the_pack.wan_core.models import load_model
    from the_pack.wan_core.pipeline import initial_noise
    from the_pack.wan_core.sampling import schedule_from_sigmas

    model = load_model()
    latents = torch.randn(2, 16, 2, 4, 4) * 3
    theirs, ours = comfy.latent_formats.Wan21(), model.latent_stats
    flow, const = comfy.model_sampling.ModelSamplingDiscreteFlow(), comfy.model_sampling.CONST()
    flow.set_parameters(shift=5.0)
    percents = [0.0, 0.2, 0.5, 0.9, 1.0]
    begins, ends = schedule_from_sigmas([0.6, 0.0]), schedule_from_sigmas([1.0, 0.6])
    noisy = theirs.process_in(_noisy(model, latents, begins))
    started = const.noise_scaling(torch.tensor(0.6), torch.zeros_like(latents), theirs.process_in(latents))
    kept = theirs.process_in(_exchanged(model, latents, ends))
    stopped = const.inverse_noise_scaling(torch.tensor(0.6), theirs.process_in(latents))
    return {
        "same_noise": torch.equal(comfy.sample.prepare_noise(latents, 123), initial_noise(tuple(latents.shape), 123)),
        "same_latent_range": torch.allclose(theirs.process_in(latents), ours.normalise(latents), atol=1e-5)
        and torch.allclose(theirs.process_out(latents), ours.restore(latents), atol=1e-5),
        "same_percents": all(abs(flow.percent_to_sigma(p) - percent_to_sigma(p, 5.0)) < 1e-6 for p in percents),
        "same_start_from_noise": torch.allclose(noisy, started, atol=1e-5),
        "same_end_with_noise": torch.allclose(kept, stopped, atol=1e-5),
    }


def latent_facts() -> dict[str, bool]:
    import comfy.sampler_helpers
    import torch
    from comfy_extras.nodes_wan import Wan22ImageToVideoLatent
    from the_pack.nodes.image import WanCoreImageLatent
    from the_pack.nodes.sampler import _noise_mask
    from the_pack.nodes.sockets import ComfyVAE
    from the_pack.wan_core.models import load_vae
    from the_pack.wan_core.presets import VAES
    from the_pack.wan_core.vae import WanVAE
    from the_pack.wan_core.weights import save_weights

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "vae.safetensors")
        save_weights(file, WanVAE(VAES["nano_vae22"]).state_dict())
        vae, pairs = ComfyVAE(load_vae(file)), []
        for frames, batch in ((1, 1), (7, 2)):
            given = {"width": 64, "height": 96, "length": 9, "batch_size": batch,
                     "start_image": torch.rand(frames, 96, 64, 3)}
            pairs.append((Wan22ImageToVideoLatent.execute(vae, **given)[0],
                          WanCoreImageLatent().make(vae, fit="crop", **given)[0]))
        del vae
    samples = torch.zeros(2, 16, 3, 4, 8)
    masks = [torch.rand(shape) for shape in ((32, 64), (1, 32, 64), (9, 32, 64), (9, 1, 30, 50), (1, 1, 3, 4, 8),
                                             (2, 1, 3, 4, 8))]
    prepared = comfy.sampler_helpers.prepare_mask
    return {
        "same_image_latent": all(torch.allclose(core[name], ours[name], atol=1e-5)
                                 for core, ours in pairs for name in ("samples", "noise_mask")),
        "same_noise_mask": all(torch.allclose(prepared(mask, samples.shape, "cpu")[:, :1], _noise_mask(mask, samples))
                               for mask in masks),
    }


def preview_facts() -> dict[str, bool]:
    import folder_paths
    import torch
    from comfy.cli_args import LatentPreviewMethod, args
    from the_pack.nodes.host import HOST
    from the_pack.nodes.previews import NANO_PREVIEWS
    from the_pack.wan_core.presets import TINY_VAES, VAES
    from the_pack.wan_core.vae import TinyVAE
    from the_pack.wan_core.weights import save_weights

    released, device = (VAES["wan21_vae"], VAES["wan22_vae"]), torch.device("cpu")

    def size(spec: object) -> tuple[str, tuple[int, int]]:
        kind, image, _ = HOST.previewer(spec, device)(torch.zeros(1, spec.z_dim, 3, 4, 6))
        return kind, image.size

    args.preview_method = LatentPreviewMethod.NoPreviews
    none = [HOST.previewer(spec, device) for spec in (*released, *NANO_PREVIEWS)]
    args.preview_method = LatentPreviewMethod.Latent2RGB
    shown = [size(spec) for spec in released]
    decoded = [size(spec) == ("JPEG", (6 * spec.spatial_stride, 4 * spec.spatial_stride)) for spec in NANO_PREVIEWS]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("taew2_1", "taew2_2"):
            save_weights(Path(folder, f"{name}.safetensors"), TinyVAE(TINY_VAES[name]).half().state_dict())
        folder_paths.add_model_folder_path("vae_approx", folder)
        rough = [size(spec) for spec in released]
        args.preview_method = LatentPreviewMethod.Auto
        tiny = [size(spec) for spec in released]
        folder_paths.folder_names_and_paths["vae_approx"][0].remove(folder)
        folder_paths.filename_list_cache.pop("vae_approx", None)
    return {"previews_can_be_off": none == [None] * 4,
            "previews_are_pictures": shown == rough == [("JPEG", (6, 4))] * 2,
            "nano_previews_are_decoded": all(decoded) and len(decoded) == 2,
            "tiny_vaes_decode_previews": tiny == [("JPEG", (48, 32)), ("JPEG", (96, 64))]}


def list_facts() -> dict[str, bool]:
    import folder_paths
    from the_pack.nodes.host import HOST

    def refused(name: str) -> bool:
        try:
            HOST.model_path("diffusion_models", name)
        except ValueError:
            return True
        return False

    def listed(folder: str = "diffusion_models") -> set[str]:
        return {Path(name).name for name in HOST.model_names(folder)}

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "models")
        (root / "sub").mkdir(parents=True)
        for key in ("diffusion_models", "vae"):
            folder_paths.add_model_folder_path(key, str(root))
        for name in ("plain.safetensors", "a.gguf", "split.safetensors.index.json", "config.json", "../outside.gguf"):
            (root / name).touch()
        first, again = listed(), listed()
        file = root / "sub" / "b.gguf"
        file.touch()
        found = {"gguf_files_are_listed": {"plain.safetensors", "a.gguf", "split.safetensors.index.json"} <= first
                 and first == again and "config.json" not in first and "a.gguf" not in listed("vae"),
                 "lists_follow_the_folders": listed() == first | {"b.gguf"},
                 "listed_files_are_found": HOST.model_path("diffusion_models", str(Path("sub", "b.gguf"))) == file,
                 "other_files_are_not": refused("../outside.gguf") and refused(str(root.parent / "outside.gguf"))}
        file.unlink()
        found["lists_follow_the_folders"] &= listed() == first
    return found


def main() -> None:
    load_pack(*sys.argv[1:3])
    sys.stdout.write(json.dumps({**placement_facts(), **swap_facts(), **agreement_facts(), **latent_facts(),
                                 **preview_facts(), **list_facts()}) + "\n")


if __name__ == "__main__":
    main()
