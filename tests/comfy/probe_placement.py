"""The pack's placement and ComfyUI's memory manager in one process; run by ComfyUI's interpreter, through launcher.py.

usage: launcher.py probe_placement.py CHECKOUT PACK
writes one line of JSON: what was built, listed and alive after each step, see `main`.
"""
import importlib.util
import json
import sys
import weakref


def load_pack(checkout: str, pack: str):
    sys.path.insert(0, checkout)
    sys.argv = [f"{checkout}/main.py", "--cpu"]
    import comfy.options
    comfy.options.enable_args_parsing()
    import nodes  # noqa: F401 - the core's nodes, and with them torch and all of comfy

    spec = importlib.util.spec_from_file_location("the_pack", f"{pack}/__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["the_pack"] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    load_pack(*sys.argv[1:3])
    import comfy.model_management as management
    import torch
    from the_pack.nodes.host import HOST, ManagedPlacement
    from the_pack.wan_core.models import load_experts

    placement = HOST.placement("transformer")
    model = load_experts(placement=placement)
    found = {"is_managed": isinstance(placement, ManagedPlacement)}
    listed = lambda: [entry.model.model_size() for entry in management.current_loaded_models]  # noqa: E731

    high = model.get("high")
    found["size_listed"] = listed() == [sum(p.numel() for p in high.state_dict().values()) * 4]
    found["same_again"] = model.get("high") is high
    found["same_with_room"] = HOST.with_room(model, 10**6).get("high") is high
    gone = weakref.ref(high)
    del high
    low = model.get("low")
    found["one_at_a_time"] = gone() is None and len(listed()) == 1
    gone = weakref.ref(low)
    del low
    management.unload_all_models()
    found["evicted"] = gone() is None and listed() == []
    again = model.get("low")
    velocity = again(torch.zeros(1, 16, 1, 2, 2), torch.zeros(1), again.prepare_text(torch.zeros(1, 1, 96)))
    found["comes_back"] = velocity.isfinite().all().item() and len(listed()) == 1
    gone = weakref.ref(again)
    del again, model, placement
    management.cleanup_models()
    found["gone_with_its_handle"] = gone() is None and listed() == []
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
