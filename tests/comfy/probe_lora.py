"""ComfyUI's own reading of a LoRA file: the weights that its loader makes of a model's.

Run by ComfyUI's interpreter, through launcher.py: launcher.py probe_lora.py CHECKOUT WEIGHTS LORA STRENGTH OUT
WEIGHTS holds a model's tensors under official names; OUT gets those that the LoRA changes.
"""
import sys
from types import SimpleNamespace


def main(checkout: str, weights: str, lora: str, strength: str, out: str) -> None:
    sys.path.insert(0, checkout)
    sys.argv = [f"{checkout}/main.py", "--cpu"]
    import comfy.options
    comfy.options.enable_args_parsing()
    import comfy.lora
    import comfy.lora_convert
    import comfy.utils
    from safetensors.torch import save_file

    tensors = {f"diffusion_model.{name}": tensor for name, tensor in comfy.utils.load_torch_file(weights).items()}
    # All that the table of key names asks a model for.
    model = SimpleNamespace(state_dict=lambda: tensors, model_config=SimpleNamespace(unet_config={}))
    names = comfy.lora.model_lora_keys_unet(model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(lora)), names)
    changed = {name: comfy.lora.calculate_weight([(float(strength), patch, 1.0, None, None)], tensors[name].clone(), name)
               for name, patch in patches.items()}
    save_file({name.removeprefix("diffusion_model."): tensor.contiguous() for name, tensor in changed.items()}, out)


main(*sys.argv[1:])
