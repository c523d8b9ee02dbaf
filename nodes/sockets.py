"""The types that travel between PrefGen's nodes."""

from comfy_api.latest import io

CATEGORY = "PrefGen"

MLLM = io.Custom("PREFGEN_MLLM")
Preference = io.Custom("PREFGEN_PREFERENCE")
User = io.Custom("PREFGEN_USER")
