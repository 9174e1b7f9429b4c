"""ComfyUI's own reading of LoRA files: the weights that its loader makes of a model's.

Run by ComfyUI's interpreter, through launcher.py: launcher.py probe_lora.py CHECKOUT STRENGTH FOLDER
FOLDER/model.safetensors holds a model's tensors under official names. For each other file NAME in FOLDER the tensors
that this LoRA changes are written to FOLDER/merged/NAME.
"""
import sys
from pathlib import Path
from types import SimpleNamespace


def main(checkout: str, strength: str, folder: str) -> None:
    sys.path.insert(0, checkout)
    sys.argv = [f"{checkout}/main.py", "--cpu"]
    import comfy.options
    comfy.options.enable_args_parsing()
    import comfy.lora
    import comfy.lora_convert
    import comfy.utils
    from safetensors.torch import save_file

    prefix = "diffusion_model."
    tensors = {prefix + name: t for name, t in comfy.utils.load_torch_file(f"{folder}/model.safetensors").items()}
    # All that the table of key names asks a model for.
    model = SimpleNamespace(state_dict=lambda: tensors, model_config=SimpleNamespace(unet_config={}))
    names = comfy.lora.model_lora_keys_unet(model, {})
    Path(folder, "merged").mkdir()
    for file in Path(folder).glob("*.safetensors"):
        if file.stem != "model":
            converted = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(str(file)))
            patches, changed = comfy.lora.load_lora(converted, names), {}
            for name, patch in patches.items():
                patched = [(float(strength), patch, 1.0, None, None)]
                changed[name.removeprefix(prefix)] = comfy.lora.calculate_weight(patched, tensors[name].clone(), name)
            save_file({name: tensor.contiguous() for name, tensor in changed.items()}, f"{folder}/merged/{file.name}")


main(*sys.argv[1:])
