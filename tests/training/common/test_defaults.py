"""Configurations mean tomorrow what they mean today: run folders and shipped files belong to their values.

`python -m tests.training.test_defaults` writes defaults.json anew, for values that are changed on purpose.
"""

import json
from pathlib import Path

import pytest

from prefgen.adapter_file import load_adapter
from prefgen.atelier import models
from training.common.config import atelier, schema, sections
from training.common.config.command import FOLDER, load, section_of

FILE = Path(__file__).with_name("defaults.json")
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def flat(values, before=""):
    """{"section.key": value} of nested mappings."""
    rows = {}
    for key, value in values.items():
        rows |= flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return rows


def values_of(name):
    return flat(load(name).model_dump(mode="json"))


def defaults():
    """{"Section.key": its value where a configuration says nothing}."""
    everything = [*vars(atelier).values(), *vars(schema).values()]
    kinds = [kind for kind in everything if isinstance(kind, type) and issubclass(kind, sections.Section)]
    fields = {f"{kind.__name__}.{name}": f.default for kind in kinds for name, f in kind.model_fields.items()}
    # A section's own defaults stand by its name already.
    fields = {key: value for key, value in fields.items() if not isinstance(value, sections.Section)}
    return {key: json.loads(json.dumps(value, default=repr)) for key, value in fields.items()}


def test_no_default_has_moved():
    expected, actual = json.loads(FILE.read_text())["defaults"], defaults()
    assert {key: actual.get(key, "gone") for key in expected} == expected


@pytest.mark.parametrize("name", NAMES)
def test_no_value_of_a_shipped_configuration_has_moved(name):
    """New keys may come; a key that went or a value that moved orphans every run folder that was made with it."""
    expected, actual = json.loads(FILE.read_text())[name], values_of(name)
    assert {key: actual.get(key, "gone") for key in expected} == expected


def test_the_shipped_adapter_is_what_its_configuration_trains():
    header = load_adapter(models.WEIGHTS / "adapter.safetensors").header
    section = section_of(load("atelier"), "train_user_attention").model_dump(mode="json")
    recorded = {key: value for key, value in header.training.items() if key in section}
    assert recorded == {key: section[key] for key in recorded} and {"steps", "batch", "lr", "distil", "seed"} <= set(
        recorded
    )
    assert header.tokens == section["tokens"]


if __name__ == "__main__":
    values = {name: values_of(name) for name in NAMES} | {"defaults": defaults()}
    FILE.write_text(json.dumps(values, indent=1) + "\n")
