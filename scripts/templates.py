"""Write workflows/*.json, the graphs of the template browser, so that they stay alike.

    python -m scripts.templates

Starts a ComfyUI to ask which inputs and outputs its nodes have. What a template needs that isn't downloaded stands in
its note, under the names that `python -m prefgen.download` and ComfyUI's own templates use.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.canvas import Canvas, Place
from scripts.comfy_server import ROOT, ComfyServer, ServerError, exit_on_terminate, remove_base
from scripts.setup_env import SetupError, find_comfyui

FOLDER = ROOT / "workflows"
SEED = 20_000
# Colours of groups, on which white titles can be read.
GREY, BLUE, GREEN = ("#8A8A8A", "#3f789e", "#2f9e62")
CLIP_VISION = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
CLIP_VISION_L = "clip-vit-large-patch14.safetensors"
FLUX_ADAPTER = "ipadapter/flux-ip-adapter-v2.safetensors"
SAMPLING = {
    "atelier": {"steps": 20, "cfg": 3.0, "sampler_name": "euler", "scheduler": "sgm_uniform"},
    "sd15": {"steps": 25, "cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"},
    "sdxl": {"steps": 25, "cfg": 6.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"},
    "flux": {"steps": 20, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"},
}
CHECKPOINTS = {"sd15": "v1-5-pruned-emaonly-fp16.safetensors", "sdxl": "sd_xl_base_1.0.safetensors"}
# An IP-Adapter was trained to give its picture again; these settings are for a taste. template_notes.json says where
# they come from.
FOR_TASTE = {"weight": 0.7, "blocks": "style"}
NOTES = json.loads((ROOT / "scripts" / "template_notes.json").read_text(encoding="utf-8"))


@dataclass
class Base:
    """What a base model brings: outputs of its loader, and how it samples."""

    model: tuple
    clip: tuple
    vae: tuple
    sampling: dict
    loader: Place


def atelier(canvas: Canvas, x: int, y: int) -> Base:
    loader = canvas.add("PrefGen_LoadAtelier", x, y, 270, 130)
    return Base(loader[0], loader[1], loader[2], SAMPLING["atelier"], loader)


def checkpoint(canvas: Canvas, family: str, x: int, y: int) -> Base:
    loader = canvas.add("CheckpointLoaderSimple", x, y, 270, 130, ckpt_name=CHECKPOINTS[family])
    return Base(loader[0], loader[1], loader[2], SAMPLING[family], loader)


def without_and_with(canvas: Canvas, base: Base, model: tuple, name: str, **inputs) -> list[Place]:
    """Two samplers with the same seed and inputs, without and with a user, and what they paint side by side."""
    return [
        painted(canvas, base, title, painting, name, **inputs)
        for title, painting in (("without", base.model), ("with", model))
    ]


def painted(canvas: Canvas, base: Base, title: str, model: tuple, name: str, **inputs) -> Place:
    """A sampler at the right, and its picture where the page opens. title: "without" stands left and above."""
    second = int(title == "with")
    top = 640 + second * 320
    called = f"{title} preference"
    settings = base.sampling | {"model": model, "seed": SEED} | inputs
    sampler = canvas.add("KSampler", 1240, top, 280, 270, f"Sampler {called}", **settings)
    decoded = canvas.add("VAEDecode", 1560, top, 200, 60, samples=sampler[0], vae=base.vae)
    prefix = f"prefgen/{name} {title}"
    canvas.add(
        "SaveImage", 400 + second * 460, 0, 440, 490, f"Save {called}", images=decoded[0], filename_prefix=prefix
    )
    return sampler


def prompts(canvas: Canvas, clip: tuple, text: str, negative: str, x: int, y: int) -> dict[str, tuple]:
    """The two prompts, as KSampler's conditions."""
    positive = canvas.add("CLIPTextEncode", x, y, 300, 150, "Prompt", clip=clip, text=text)
    other = canvas.add("CLIPTextEncode", x, y + 210, 300, 120, "Negative prompt", clip=clip, text=negative)
    return {"positive": positive[0], "negative": other[0]}


def four_nodes(
    canvas: Canvas, base: Base, x: int, y: int, encoders: dict[str, tuple], adapter: str, apply: dict
) -> tuple[tuple, list[Place]]:
    """(MODEL, the places) of a history that is loaded, encoded, fused and applied."""
    history = canvas.add("PrefGen_LoadPreferenceHistory", x, y, 290, 232, history="example: ada")
    encode = canvas.add(
        "PrefGen_EncodePreferenceHistory",
        x + 320,
        y,
        260,
        350,
        liked=history[0],
        disliked=history[1],
        **encoders,
    )
    fuse = canvas.add("PrefGen_FuseUserVector", x + 610, y, 270, 258, preference=encode[0], adapter=adapter)
    applied = canvas.add(
        "PrefGen_ApplyUserCrossAttention", x + 610, y + 310, 270, 330, model=base.model, user=fuse[0], **apply
    )
    return applied[0], [history, encode, fuse, applied]


def try_it(canvas: Canvas) -> None:
    base = atelier(canvas, 0, 640)
    latent = canvas.add("EmptyLatentImage", 0, 830, 270, 130, width=128, height=128)
    conditions = prompts(canvas, base.clip, "a sailing boat", "", 300, 640)
    mllm = canvas.add("PrefGen_LoadPreferenceMLLM", 0, 1340, 270, 134, mllm="atelier")
    model, places = four_nodes(
        canvas, base, 300, 1080, {"mllm": mllm[0], "clip_vision": base.loader[3]}, "atelier", {"weight": 1.0}
    )
    samplers = without_and_with(canvas, base, model, "atelier", latent_image=latent[0], **conditions)
    canvas.group("The user: what they liked and disliked", BLUE, mllm, *places)
    canvas.group("The same prompt and seed, without and with", GREY, *samplers)


def my_taste(canvas: Canvas, family: str) -> None:
    adapter = {"sd15": "ip-adapter-plus_sd15", "sdxl": "ip-adapter-plus_sdxl_vit-h"}[family]
    base = checkpoint(canvas, family, 0, 640)
    side = {"sd15": 512, "sdxl": 1024}[family]
    latent = canvas.add("EmptyLatentImage", 0, 830, 270, 130, width=side, height=side)
    conditions = prompts(canvas, base.clip, "a small harbour at dusk", "", 300, 640)
    vision = canvas.add("CLIPVisionLoader", 0, 1340, 270, 60, clip_name=CLIP_VISION)
    model, places = four_nodes(
        canvas, base, 300, 1080, {"clip_vision": vision[0]}, f"ipadapter/{adapter}.safetensors", FOR_TASTE
    )
    samplers = without_and_with(canvas, base, model, f"my taste {family}", latent_image=latent[0], **conditions)
    canvas.group("The user: what they liked and disliked", BLUE, vision, *places)
    canvas.group("The same prompt and seed, without and with", GREY, *samplers)


def flux(canvas: Canvas) -> tuple[Base, tuple]:
    """(Flux.1 dev from its own files, an empty latent)."""
    unet = canvas.add("UNETLoader", 0, 640, 270, 90, unet_name="flux1-dev.safetensors")
    clip = canvas.add(
        "DualCLIPLoader",
        0,
        790,
        270,
        140,
        clip_name1="clip_l.safetensors",
        clip_name2="t5xxl_fp8_e4m3fn.safetensors",
        type="flux",
    )
    vae = canvas.add("VAELoader", 0, 990, 270, 60, vae_name="ae.safetensors")
    latent = canvas.add("EmptySD3LatentImage", 0, 1110, 270, 110, width=1024, height=1024)
    return Base(unet[0], clip[0], vae[0], SAMPLING["flux"], unet), latent[0]


def my_taste_flux(canvas: Canvas) -> None:
    base, latent = flux(canvas)
    encoded = canvas.add("CLIPTextEncode", 300, 640, 280, 150, "Prompt", clip=base.clip, text="a small harbour at dusk")
    guided = canvas.add("FluxGuidance", 300, 850, 280, 70, conditioning=encoded[0])
    none = canvas.add("ConditioningZeroOut", 610, 850, 270, 40, conditioning=encoded[0])
    vision = canvas.add("CLIPVisionLoader", 0, 1340, 270, 60, clip_name=CLIP_VISION_L)
    model, places = four_nodes(canvas, base, 300, 1080, {"clip_vision": vision[0]}, FLUX_ADAPTER, {"weight": 0.7})
    rest = {"positive": guided[0], "negative": none[0], "latent_image": latent}
    samplers = without_and_with(canvas, base, model, "my taste flux", **rest)
    canvas.group("The user: what they liked and disliked", BLUE, vision, *places)
    canvas.group("The same prompt and seed, without and with", GREY, *samplers)


def in_words(canvas: Canvas) -> None:
    base, latent = flux(canvas)
    text = canvas.add("PrimitiveStringMultiline", 300, 640, 280, 140, "Prompt", value="a small harbour at dusk")
    taste = canvas.add(
        "PrefGen_ApplyTaste", 300, 850, 280, 330, model=base.model, taste="example: ada", adapter="words only"
    )
    joined = canvas.add("StringConcatenate", 610, 850, 270, 150, string_a=text[0], string_b=taste[1], delimiter=", ")
    canvas.add("PreviewAny", 610, 1060, 270, 120, "The words", source=taste[1])
    guided = []
    for number, (title, source) in enumerate((("without", text[0]), ("with", joined[0]))):
        encoded = canvas.add(
            "CLIPTextEncode", 910, 640 + number * 320, 280, 90, f"Prompt {title} the taste", clip=base.clip, text=source
        )
        guided.append(canvas.add("FluxGuidance", 910, 790 + number * 320, 280, 70, conditioning=encoded[0])[0])
    none = canvas.add("ConditioningZeroOut", 910, 1220, 280, 40, conditioning=guided[0])
    rest = {"negative": none[0], "latent_image": latent}
    samplers = [
        painted(canvas, base, "without", base.model, "in words", positive=guided[0], **rest),
        painted(canvas, base, "with", taste[0], "in words", positive=guided[1], **rest),
    ]
    canvas.group("The taste, in words", BLUE, taste, joined)
    canvas.group("The same prompt and seed, without and with", GREY, *samplers)


def two_tastes(canvas: Canvas) -> None:
    base = atelier(canvas, 0, 640)
    latent = canvas.add("EmptyLatentImage", 0, 830, 270, 130, width=128, height=128)
    conditions = prompts(canvas, base.clip, "a house and a moon", "", 300, 640)
    black = canvas.add("SolidMask", 0, 1080, 270, 110, "All black", value=0.0, width=128, height=128)
    white = canvas.add("SolidMask", 0, 1240, 270, 110, "White, half as wide", value=1.0, width=64, height=128)
    left = canvas.add(
        "MaskComposite", 300, 1080, 300, 150, "Left half", destination=black[0], source=white[0], operation="add"
    )
    right = canvas.add("InvertMask", 300, 1290, 300, 40, "Right half", mask=left[0])
    ada = canvas.add(
        "PrefGen_ApplyTaste", 640, 640, 270, 330, "Ada, left", model=base.model, taste="example: ada", attn_mask=left[0]
    )
    both = canvas.add(
        "PrefGen_ApplyTaste",
        940,
        640,
        270,
        330,
        "Bruno, right",
        model=ada[0],
        taste="example: bruno",
        attn_mask=right[0],
    )
    samplers = without_and_with(canvas, base, both[0], "two tastes", latent_image=latent[0], **conditions)
    canvas.group("Two tastes, each in its half", BLUE, ada, both)
    canvas.group("Where each of them counts", GREEN, black, white, left, right)
    canvas.group("The same prompt and seed, without and with", GREY, *samplers)


def ideation(canvas: Canvas) -> None:
    base = atelier(canvas, 0, 640)
    latent = canvas.add("EmptyLatentImage", 0, 830, 270, 130, width=128, height=128, batch_size=3)
    same = canvas.add("LatentBatchSeedBehavior", 0, 1020, 270, 60, samples=latent[0], seed_behavior="fixed")
    conditions = prompts(canvas, base.clip, "a lighthouse", "", 300, 640)
    rows = {}
    places = []
    names = ("ada", "bruno", "chiyo")
    for number, name in enumerate(names):
        x = 640 + number * 300
        taste = canvas.add(
            "PrefGen_ApplyTaste",
            x,
            640,
            280,
            330,
            model=base.model,
            taste=f"example: {name}",
            item_weights="0=0, 1=0.5, 2=1",
        )
        sampler = canvas.add(
            "KSampler",
            x,
            1020,
            280,
            270,
            model=taste[0],
            latent_image=same[0],
            seed=SEED,
            **base.sampling,
            **conditions,
        )
        decoded = canvas.add("VAEDecode", x, 1340, 280, 60, samples=sampler[0], vae=base.vae)
        rows[f"row_{number + 1}"] = decoded[0]
        places += [taste, sampler]
    sheet = canvas.add(
        "PrefGen_LabelledSheet",
        1100,
        0,
        300,
        490,
        row_labels="\n".join(names),
        column_labels="without\nhalf\nfull",
        **rows,
    )
    canvas.add("SaveImage", 400, 0, 670, 490, "Save the sheet", images=sheet[0], filename_prefix="prefgen/ideas")
    canvas.group("Three tastes, three strengths each", BLUE, *places)


def use(canvas: Canvas, name: str, text: str, size: tuple[int, int]) -> None:
    """One of the paper's uses on SDXL, by Apply Taste."""
    base = checkpoint(canvas, "sdxl", 0, 640)
    conditions = prompts(canvas, base.clip, text, "", 300, 640)
    taste = canvas.add("PrefGen_ApplyTaste", 640, 640, 560, 330, model=base.model, taste="example: ada")
    if name == "avatar":
        photo = canvas.add("LoadImage", 0, 830, 270, 320, "Your picture", image="example.png")
        scaled = canvas.add(
            "ImageScale",
            300,
            1040,
            300,
            150,
            image=photo[0],
            upscale_method="lanczos",
            width=size[0],
            height=size[1],
            crop="center",
        )
        latent = canvas.add("VAEEncode", 300, 1250, 300, 60, pixels=scaled[0], vae=base.vae)
    else:
        latent = canvas.add("EmptyLatentImage", 0, 830, 270, 130, width=size[0], height=size[1])
    denoise = 0.6 if name == "avatar" else 1.0
    samplers = without_and_with(
        canvas, base, taste[0], name.replace("_", " "), denoise=denoise, latent_image=latent[0], **conditions
    )
    canvas.group("The taste", BLUE, taste)
    canvas.group("The same prompt and seed, without and with", GREY, *samplers)


LAMP = "a desk lamp, product photograph, plain background"
RANGER = "character design of a young ranger with a long coat, full body, front view, plain background"
PORTRAIT = "portrait, head and shoulders, looking at the viewer"
TEMPLATES: dict[str, Callable[[Canvas], None]] = {
    "prefgen_atelier": try_it,
    "my_taste_sdxl": lambda canvas: my_taste(canvas, "sdxl"),
    "my_taste_sd15": lambda canvas: my_taste(canvas, "sd15"),
    "my_taste_flux": my_taste_flux,
    "my_taste_in_words": in_words,
    "two_tastes_one_canvas": two_tastes,
    "ideation_sheet": ideation,
    "product_design": lambda canvas: use(canvas, "product_design", LAMP, (1024, 1024)),
    "character_design": lambda canvas: use(canvas, "character_design", RANGER, (832, 1216)),
    "avatar": lambda canvas: use(canvas, "avatar", PORTRAIT, (1024, 1024)),
}


def write(info: dict, folder: Path) -> None:
    """Write every template into a folder."""
    for name, draw in TEMPLATES.items():
        canvas = Canvas(info)
        canvas.note(note_of(name))
        draw(canvas)
        text = json.dumps(canvas.saved(name), indent=1, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def note_of(name: str) -> str:
    """What a template is, in two languages."""
    said = NOTES[name]
    return "\n\n".join([f"# {said['title']}", " ".join(said["en"]), "".join(said["zh"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the graphs (default: workflows)")
    args = parser.parse_args()
    exit_on_terminate()
    base = Path(tempfile.mkdtemp(prefix="prefgen-templates-"))
    try:
        with ComfyServer(find_comfyui(), base) as server, server.client() as client:
            write(client.object_info(), args.out)
    finally:
        remove_base(base)


if __name__ == "__main__":
    try:
        main()
    except (SetupError, ServerError, ValueError) as error:
        sys.exit(str(error))
