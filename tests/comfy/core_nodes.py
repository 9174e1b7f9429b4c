"""Nodes of ComfyUI's core that the shipped workflows use, as its server describes them.

With this table the workflows are checked where no ComfyUI is installed; where one is, test_workflows.py compares the
table with it. It holds what a saved graph depends on: names and types of the inputs in their order, choices, limits of
numbers, and outputs. The choices of a file list are a server's own, so none are given. What newer nodes call COMBO is
written as the list of its choices, too.

Reference: https://docs.comfy.org/development/comfyui-server/comms_routes (/object_info)
"""

LARGEST = 16384
SIDE = ["INT", {"default": 512, "min": 1, "max": LARGEST}]
SCALED_SIDE = ["INT", {"default": 512, "min": 0, "max": LARGEST}]
PLACE = ["INT", {"default": 0, "min": 0, "max": LARGEST}]

CORE_NODES = {
    "EmptyImage": {
        "display_name": "EmptyImage", "output": ["IMAGE"], "output_name": ["IMAGE"],
        "input": {"required": {
            "width": SIDE, "height": SIDE, "batch_size": ["INT", {"default": 1, "min": 1, "max": 4096}],
            "color": ["INT", {"default": 0, "min": 0, "max": 0xFFFFFF}]}}},
    "ImageCompositeMasked": {
        "display_name": "ImageCompositeMasked", "output": ["IMAGE"], "output_name": ["IMAGE"],
        "input": {"required": {
            "destination": ["IMAGE", {}], "source": ["IMAGE", {}], "x": PLACE, "y": PLACE,
            "resize_source": ["BOOLEAN", {"default": False}]},
            "optional": {"mask": ["MASK", {}]}}},
    "ImageFromBatch": {
        "display_name": "ImageFromBatch", "output": ["IMAGE"], "output_name": ["IMAGE"],
        "input": {"required": {
            "image": ["IMAGE", {}], "batch_index": ["INT", {"default": 0, "min": 0, "max": 4095}],
            "length": ["INT", {"default": 1, "min": 1, "max": 4096}]}}},
    "ImageScale": {
        "display_name": "Upscale Image", "output": ["IMAGE"], "output_name": ["IMAGE"],
        "input": {"required": {
            "image": ["IMAGE", {}], "upscale_method": [["nearest-exact", "bilinear", "area", "bicubic", "lanczos"], {}],
            "width": SCALED_SIDE, "height": SCALED_SIDE, "crop": [["disabled", "center"], {}]}}},
    "ImageToMask": {
        "display_name": "Convert Image to Mask", "output": ["MASK"], "output_name": ["MASK"],
        "input": {"required": {"image": ["IMAGE", {}], "channel": [["red", "green", "blue", "alpha"], {}]}}},
    "LoadImage": {
        "display_name": "Load Image", "output": ["IMAGE", "MASK"], "output_name": ["IMAGE", "MASK"],
        "input": {"required": {"image": [[], {"image_upload": True}]}}},
    "LoadVideo": {
        "display_name": "Load Video", "output": ["VIDEO"], "output_name": ["VIDEO"],
        "input": {"required": {"file": [[], {"video_upload": True}]}}},
    "GetVideoComponents": {
        "display_name": "Get Video Components", "output": ["IMAGE", "AUDIO", "FLOAT"],
        "output_name": ["images", "audio", "fps"],
        "input": {"required": {"video": ["VIDEO", {}]}}},
    "MaskComposite": {
        "display_name": "MaskComposite", "output": ["MASK"], "output_name": ["MASK"],
        "input": {"required": {
            "destination": ["MASK", {}], "source": ["MASK", {}], "x": PLACE, "y": PLACE,
            "operation": [["multiply", "add", "subtract", "and", "or", "xor"], {}]}}},
    "MaskToImage": {
        "display_name": "Convert Mask to Image", "output": ["IMAGE"], "output_name": ["IMAGE"],
        "input": {"required": {"mask": ["MASK", {}]}}},
    "PreviewImage": {
        "display_name": "Preview Image", "output": [], "output_name": [],
        "input": {"required": {"images": ["IMAGE", {}]}}},
    "SolidMask": {
        "display_name": "SolidMask", "output": ["MASK"], "output_name": ["MASK"],
        "input": {"required": {
            "value": ["FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0}], "width": SIDE, "height": SIDE}}},
    "ThresholdMask": {
        "display_name": "ThresholdMask", "output": ["MASK"], "output_name": ["MASK"],
        "input": {"required": {
            "mask": ["MASK", {}], "value": ["FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0}]}}},
    "VAEEncode": {
        "display_name": "VAE Encode", "output": ["LATENT"], "output_name": ["LATENT"],
        "input": {"required": {"pixels": ["IMAGE", {}], "vae": ["VAE", {}]}}},
}
