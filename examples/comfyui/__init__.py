"""Custom nodes for ComfyUI: put this folder into ``ComfyUI/custom_nodes``, and ``pip install lazy-compile`` there.

All three lie under *advanced/lazy_compile*. The MODEL that goes in is not changed; bypass a node to be without it.
"""

from lazy_compile import LazyConfig
from lazy_compile.integrations import comfyui

CATEGORY = "advanced/lazy_compile"
REUSE = (["linear", "last"], {"tooltip": "linear is closer to the dense result, last takes half of the memory"})


class LazyCompilePreset:
    """MODEL -> MODEL, lazy by one of three presets that fit any model and any number of steps."""

    CATEGORY, FUNCTION = CATEGORY, "apply"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = "Skips attention and MLP branches that a step does not need. quality changes least, fast saves most."

    @classmethod
    def INPUT_TYPES(cls):
        presets = (["quality", "balanced", "fast", "off"], {"default": "balanced"})
        return {"required": {"model": ("MODEL",), "preset": presets, "reuse": REUSE}}

    def apply(self, model, preset, reuse):
        if preset == "off":
            return (comfyui.unpatch(model),)
        return (comfyui.patch(model, preset, LazyConfig(reuse=reuse)),)


class LazyCompileSchedule:
    """MODEL -> MODEL, lazy by a mask of steps, or by a folder that ``lazy-compile plan`` wrote."""

    CATEGORY, FUNCTION = CATEGORY, "apply"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = "1 computes and 0 reuses, one digit for each call of a trajectory; calls after the last compute."

    @classmethod
    def INPUT_TYPES(cls):
        schedule = ("STRING", {"default": "11110101010101010101"})
        return {"required": {"model": ("MODEL",), "schedule": schedule, "reuse": REUSE}}

    def apply(self, model, schedule, reuse):
        return (comfyui.patch(model, comfyui.policy_of(schedule), LazyConfig(reuse=reuse)),)


class LazyCompileStats:
    """LATENT -> LATENT, and a line about the sampling that made it: what was reused, or why nothing was."""

    CATEGORY, FUNCTION = CATEGORY, "read"
    RETURN_TYPES, RETURN_NAMES = ("LATENT", "STRING"), ("latent", "report")
    OUTPUT_NODE = True
    DESCRIPTION = "Connect the LATENT of the sampler, and the MODEL that went into it."

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "latent": ("LATENT",)}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")  # read after every run

    def read(self, model, latent):
        state = comfyui.state_of(model)
        report = "this MODEL has no Lazy Compile node" if state is None else state.report
        return {"ui": {"text": [report]}, "result": (latent, report)}


NODE_CLASS_MAPPINGS = {
    "LazyCompilePreset": LazyCompilePreset,
    "LazyCompileSchedule": LazyCompileSchedule,
    "LazyCompileStats": LazyCompileStats,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LazyCompilePreset": "Lazy Compile (preset)",
    "LazyCompileSchedule": "Lazy Compile (schedule)",
    "LazyCompileStats": "Lazy Compile stats",
}
