"""Wan 2.1 and 2.2 video models for ComfyUI.

ComfyUI imports this folder as a package and reads the three names below. The engine in `wan_core/` also works without
ComfyUI: `import wan_core`, or `python -m wan_core`.
"""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

WEB_DIRECTORY = "./web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
