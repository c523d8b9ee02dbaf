"""The only rooms that import ComfyUI: the model patcher glue, the atelier in ComfyUI's classes, folders, memory."""
