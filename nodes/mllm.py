"""The multimodal LLM that reads a history."""

from comfy_api.latest import io

from ..prefgen.comfy import folders, memory
from .choices import checked
from .sockets import CATEGORY, MLLM, searched


class LoadPreferenceMLLM(io.ComfyNode):
    """A folder of a transformers model -> PREFGEN_MLLM."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PrefGen_LoadPreferenceMLLM",
            display_name="Load Preference MLLM",
            category=CATEGORY,
            **searched("taste", "vlm", "llm", "qwen", "caption"),
            description="Loads the multimodal LLM that reads your liked and disliked pictures. It leaves the graphics "
            "card before sampling starts.",
            inputs=[
                io.Combo.Input(
                    "mllm",
                    options=list(folders.mllms()),
                    tooltip="'atelier' is built in. Others are folders of SmolVLM2, Idefics2, Idefics3, Qwen2.5-VL, "
                    "Qwen3-VL or LLaVA-OneVision models (safetensors) in models/prefgen/mllm or models/LLM. Choose the "
                    "one that the adapter was trained with.",
                ),
                io.Combo.Input(
                    "precision",
                    options=memory.precisions(),
                    default="auto",
                    tooltip="auto: what suits the device; small models and the CPU use fp32. nf4 (4-bit) appears if "
                    "bitsandbytes is installed. The closest match to training is the precision that the adapter was "
                    "trained with.",
                ),
                io.Combo.Input(
                    "device",
                    options=list(memory.DEVICES),
                    default="auto",
                    tooltip="auto: where ComfyUI puts text encoders. cpu: slower, but needs no graphics memory.",
                ),
                io.Combo.Input(
                    "lora",
                    options=list(folders.mllm_loras()),
                    default=folders.NO_LORA,
                    optional=True,
                    tooltip="A LoRA for this MLLM, as saved by peft (adapter_config.json and "
                    "adapter_model.safetensors), in models/prefgen/mllm_lora/<name>.",
                ),
            ],
            outputs=[
                MLLM.Output(
                    display_name="PREFGEN_MLLM", tooltip="For Encode Preference History and Describe Preference."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, mllm):
        # ComfyUI shows the sentence once for every input that is named here. The other combos are checked when the
        # node runs (see choices.py).
        return checked(folders.mllm_path, mllm)

    @classmethod
    def fingerprint_inputs(cls, mllm, lora=folders.NO_LORA, **_):
        return folders.mllm_fingerprint(mllm, lora)

    @classmethod
    def execute(cls, mllm, precision="auto", device="auto", lora=folders.NO_LORA) -> io.NodeOutput:
        loaded = memory.load_mllm(folders.mllm_path(mllm), precision, device, folders.mllm_lora_path(lora))
        return io.NodeOutput(loaded)
