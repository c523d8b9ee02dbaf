"""The multimodal LLM that reads a history."""

from comfy_api.latest import io

from ..prefgen.comfy import folders, memory
from .choices import checked
from .sockets import CATEGORY, MLLM


class LoadPreferenceMLLM(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PrefGen_LoadPreferenceMLLM",
            display_name="Load Preference MLLM",
            category=CATEGORY,
            description="Loads the multimodal LLM that reads liked and disliked pictures. It leaves the graphics card "
            "before sampling starts.",
            inputs=[
                io.Combo.Input(
                    "mllm",
                    options=list(folders.mllms()),
                    tooltip="'atelier' is embedded. Others: folders of Idefics3 or SmolVLM models (safetensors) in "
                    "models/prefgen/mllm or models/LLM. It must be the one the adapter was trained with.",
                ),
                io.Combo.Input(
                    "precision",
                    options=["auto", *memory.DTYPES],
                    default="auto",
                    tooltip="auto: what the device is good at; small models and the CPU use fp32. Use the precision "
                    "that the adapter was trained with when it matters.",
                ),
                io.Combo.Input(
                    "device",
                    options=["auto", "cpu"],
                    default="auto",
                    tooltip="auto: where ComfyUI puts text encoders. cpu: slower, needs no graphics memory.",
                ),
            ],
            outputs=[MLLM.Output(display_name="PREFGEN_MLLM", tooltip="For Encode Preference History.")],
        )

    @classmethod
    def validate_inputs(cls, mllm):
        return checked(folders.mllm_path, mllm)

    @classmethod
    def execute(cls, mllm, precision="auto", device="auto") -> io.NodeOutput:
        return io.NodeOutput(memory.load_mllm(folders.mllm_path(mllm), precision, device))
