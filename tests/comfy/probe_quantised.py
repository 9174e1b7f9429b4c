"""ComfyUI's own loader on model files: what it detects, the numbers it takes its weights for, and one forward pass.

Run by ComfyUI's interpreter, through launcher.py: launcher.py probe_quantised.py CHECKOUT FOLDER
FOLDER/inputs.safetensors holds x, timestep and context. For each other file NAME.safetensors in FOLDER the tensors
"velocity" and "weight:LAYER", for every linear layer of the blocks, are written to FOLDER/read/NAME.safetensors, with
what was detected as metadata.
"""
import sys
from pathlib import Path


def main(checkout: str, folder: str) -> None:
    sys.path.insert(0, checkout)
    sys.argv = [f"{checkout}/main.py", "--cpu"]
    import comfy.options
    comfy.options.enable_args_parsing()
    import comfy.sd
    import comfy.utils
    import torch
    from safetensors.torch import save_file

    inputs = comfy.utils.load_torch_file(f"{folder}/inputs.safetensors")
    Path(folder, "read").mkdir()
    for file in sorted(Path(folder).glob("*.safetensors")):
        if file.stem == "inputs":
            continue
        patcher = comfy.sd.load_diffusion_model(str(file))
        config, module = patcher.model.model_config, patcher.model.diffusion_model
        tensors = {}
        for name, layer in module.blocks.named_modules():
            if isinstance(layer, torch.nn.Linear):
                scale = getattr(layer, "scale_weight", None)
                weight = layer.weight.detach().float()
                tensors[f"weight:blocks.{name}"] = weight if scale is None else weight * scale.detach().float()
        with torch.no_grad():
            tensors["velocity"] = module(inputs["x"], inputs["timestep"], inputs["context"]).float()
        detected = {"class": type(config).__name__, "scaled_fp8": str(config.scaled_fp8),
                    "multiplies_in_fp8": str(config.optimizations.get("fp8", False))}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{folder}/read/{file.name}",
                  metadata=detected)


main(*sys.argv[1:])
