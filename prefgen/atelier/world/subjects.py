"""What prompts ask for: subjects in classes, settings, company, and how many."""

from __future__ import annotations

# class -> {subject: how a prompt says it}; the class itself is what an open prompt says.
CLASSES: dict[str, dict[str, str]] = {
    "animal": {"cat": "a cat", "owl": "an owl", "rabbit": "a rabbit", "snail": "a snail"},
    "plant": {"tree": "a tree", "sunflower": "a sunflower", "cactus": "a cactus", "palm": "a palm tree"},
    "vehicle": {"car": "a car", "boat": "a sailing boat", "rocket": "a rocket", "balloon": "a hot air balloon"},
    "building": {"house": "a house", "lighthouse": "a lighthouse", "castle": "a castle", "windmill": "a windmill"},
    "thing": {"teacup": "a cup of tea", "umbrella": "an umbrella", "guitar": "a guitar", "clock": "an alarm clock"},
    "person": {"astronaut": "an astronaut", "wizard": "a wizard", "chef": "a chef", "king": "a king"},
}
OPEN_WORDS: dict[str, str] = {
    "animal": "an animal",
    "plant": "a plant",
    "vehicle": "a vehicle",
    "building": "a building",
    "thing": "a thing",
    "person": "a person",
}
PLURALS: dict[str, str] = {
    "cat": "cats",
    "owl": "owls",
    "rabbit": "rabbits",
    "snail": "snails",
    "tree": "trees",
    "sunflower": "sunflowers",
    "cactus": "cactuses",
    "palm": "palm trees",
    "car": "cars",
    "boat": "sailing boats",
    "rocket": "rockets",
    "balloon": "hot air balloons",
    "house": "houses",
    "lighthouse": "lighthouses",
    "castle": "castles",
    "windmill": "windmills",
    "teacup": "cups of tea",
    "umbrella": "umbrellas",
    "guitar": "guitars",
    "clock": "alarm clocks",
    "astronaut": "astronauts",
    "wizard": "wizards",
    "chef": "chefs",
    "king": "kings",
    "animal": "animals",
    "plant": "plants",
    "vehicle": "vehicles",
    "building": "buildings",
    "thing": "things",
    "person": "people",
}
SUBJECTS: dict[str, str] = {name: phrase for members in CLASSES.values() for name, phrase in members.items()}
CLASS_OF: dict[str, str] = {name: kind for kind, members in CLASSES.items() for name in members}

NUMBERS = ("one", "two", "many")
SETTINGS: dict[str, str] = {
    "none": "",
    "garden": "in a garden",
    "shore": "on the shore",
    "night": "under a night sky",
    "room": "in a room",
    "street": "in a street",
}
COMPANIONS: dict[str, str] = {
    "none": "",
    "moon": "a moon",
    "cloud": "a cloud",
    "heart": "a heart",
    "bird": "a bird",
    "butterfly": "a butterfly",
    "kite": "a kite",
}
OPEN_SETTING = "somewhere"
OPEN_COMPANION = "something in the sky"
