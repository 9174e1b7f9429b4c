"""The pack and ComfyUI in one process: its memory manager with our placement, its conventions beside ours.

Run by ComfyUI's interpreter, through launcher.py: launcher.py probe_inside.py CHECKOUT PACK
Writes one line of JSON: {name of a fact: whether it holds}; test_inside.py says what each means.
"""
import importlib.util
import json
import sys
import weakref


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
    found["size_is_known"] = listed() == [sum(weight.numel() for weight in high.state_dict().values()) * 4]
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


def preview_facts() -> dict[str, bool]:
    import torch
    from comfy.cli_args import LatentPreviewMethod, args
    from the_pack.nodes.host import HOST
    from the_pack.wan_core.presets import VAES

    specs, device, clean = (VAES["wan21_vae"], VAES["nano_vae"]), torch.device("cpu"), torch.zeros(1, 16, 3, 4, 6)
    args.preview_method = LatentPreviewMethod.NoPreviews
    none = [HOST.previewer(spec, device) for spec in specs]
    args.preview_method = LatentPreviewMethod.Latent2RGB
    shown = [HOST.previewer(spec, device)(clean) for spec in specs]
    pictures = [(kind, image.size) for kind, image, _ in shown]
    return {"previews_can_be_off": none == [None, None],
            "previews_are_pictures": pictures == [("JPEG", (6, 4)), ("JPEG", (48, 32))]}


def main() -> None:
    load_pack(*sys.argv[1:3])
    sys.stdout.write(json.dumps({**placement_facts(), **agreement_facts(), **preview_facts()}) + "\n")


if __name__ == "__main__":
    main()
