"""ComfyUI's nodes: widgets and sockets on one side, calls of the engine on the other, nothing in between.

Saved workflows hold the ids and store widget values by position: ids never change, widgets are only ever appended.
"""

from .attention import WanCoreAttention
from .cache import WanCoreEasyCache, WanCoreMagCache, WanCoreStepCache, WanCoreTeaCache
from .compile import WanCoreCompile
from .guidance import WanCoreGuidance, WanCoreNAG, WanCoreSkipLayers
from .image import WanCoreImageLatent, WanCoreImageToVideo, WanCoreVideoSize
from .latent import WanCoreDecode, WanCoreEmptyLatent
from .loaders import (
    WanCoreCLIPVisionLoader,
    WanCoreExpertPairLoader,
    WanCoreModelLoader,
    WanCoreTextEncoderLoader,
    WanCoreVAELoader,
)
from .lora import WanCoreLora
from .memory import WanCoreMemory
from .sampler import WanCoreSampler
from .schedule import WanCoreSchedule
from .text import WanCoreTextEncode
from .vace import WanCoreVace, WanCoreVaceModule
from .video import WanCoreSaveVideo

NODE_CLASS_MAPPINGS = {
    "WanCoreModelLoader": WanCoreModelLoader,
    "WanCoreExpertPairLoader": WanCoreExpertPairLoader,
    "WanCoreLora": WanCoreLora,
    "WanCoreGuidance": WanCoreGuidance,
    "WanCoreNAG": WanCoreNAG,
    "WanCoreSkipLayers": WanCoreSkipLayers,
    "WanCoreAttention": WanCoreAttention,
    "WanCoreMemory": WanCoreMemory,
    "WanCoreCompile": WanCoreCompile,
    "WanCoreStepCache": WanCoreStepCache,
    "WanCoreTeaCache": WanCoreTeaCache,
    "WanCoreMagCache": WanCoreMagCache,
    "WanCoreEasyCache": WanCoreEasyCache,
    "WanCoreTextEncoderLoader": WanCoreTextEncoderLoader,
    "WanCoreCLIPVisionLoader": WanCoreCLIPVisionLoader,
    "WanCoreVAELoader": WanCoreVAELoader,
    "WanCoreTextEncode": WanCoreTextEncode,
    "WanCoreImageToVideo": WanCoreImageToVideo,
    "WanCoreVace": WanCoreVace,
    "WanCoreVaceModule": WanCoreVaceModule,
    "WanCoreEmptyLatent": WanCoreEmptyLatent,
    "WanCoreImageLatent": WanCoreImageLatent,
    "WanCoreVideoSize": WanCoreVideoSize,
    "WanCoreSchedule": WanCoreSchedule,
    "WanCoreSampler": WanCoreSampler,
    "WanCoreDecode": WanCoreDecode,
    "WanCoreSaveVideo": WanCoreSaveVideo,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "WanCoreModelLoader": "Wan Model Loader",
    "WanCoreExpertPairLoader": "Wan Expert Pair Loader",
    "WanCoreLora": "Wan LoRA",
    "WanCoreGuidance": "Wan Guidance",
    "WanCoreNAG": "Wan NAG",
    "WanCoreSkipLayers": "Wan Skip Layers",
    "WanCoreAttention": "Wan Attention",
    "WanCoreMemory": "Wan Memory",
    "WanCoreCompile": "Wan Compile",
    "WanCoreStepCache": "Wan Step Cache",
    "WanCoreTeaCache": "Wan TeaCache",
    "WanCoreMagCache": "Wan MagCache",
    "WanCoreEasyCache": "Wan EasyCache",
    "WanCoreTextEncoderLoader": "Wan Text Encoder Loader",
    "WanCoreCLIPVisionLoader": "Wan CLIP Vision Loader",
    "WanCoreVAELoader": "Wan VAE Loader",
    "WanCoreTextEncode": "Wan Text Encode",
    "WanCoreImageToVideo": "Wan Image to Video",
    "WanCoreVace": "Wan VACE",
    "WanCoreVaceModule": "Wan VACE Module",
    "WanCoreEmptyLatent": "Wan Empty Latent",
    "WanCoreImageLatent": "Wan Image Latent",
    "WanCoreVideoSize": "Wan Video Size",
    "WanCoreSchedule": "Wan Schedule",
    "WanCoreSampler": "Wan Sampler",
    "WanCoreDecode": "Wan Decode",
    "WanCoreSaveVideo": "Wan Save Video",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
