"""The label tables of Unified Perceptual Parsing: counts, places and names that the official code's tables have."""

from __future__ import annotations

from fastuper.data.parsing_labels import TASKS, default_labels, default_object_parts

COUNTS = {"scene": 365, "object": 336, "part": 153, "material": 26, "texture": 47}
# fmt: off
# The classes at every tenth (or fifth) place.
MARKED = {
    "scene": {
        0: "airfield", 10: "aqueduct", 20: "art_school", 30: "badlands", 40: "barn", 50: "beauty_salon",
        60: "bookstore", 70: "bus_interior", 80: "candy_store", 90: "church/indoor", 100: "computer_room", 110: "creek",
        120: "dining_hall", 130: "elevator_lobby", 140: "field/cultivated", 150: "forest/broadleaf",
        160: "general_store/indoor", 170: "hangar/outdoor", 180: "hot_spring", 190: "iceberg", 200: "kasbah",
        210: "lecture_room", 220: "mansion", 230: "mosque/outdoor", 240: "nursery", 250: "orchestra_pit",
        260: "pavilion", 270: "plaza", 280: "reception", 290: "roof_garden", 300: "shoe_shop", 310: "soccer_field",
        320: "subway_station/platform", 330: "temple/asia", 340: "trench", 350: "volcano", 360: "wind_farm",
    },
    "object": {
        0: "-", 10: "road", 20: "signboard", 30: "box", 40: "vase", 50: "step", 60: "ashcan", 70: "house",
        80: "stairway", 90: "flag", 100: "tray", 110: "toilet", 120: "bus", 130: "air conditioner", 140: "can",
        150: "manhole", 160: "oven", 170: "pool table", 180: "mug", 190: "grandstand", 200: "screen door", 210: "spoon",
        220: "embankment", 230: "vent", 240: "washer", 250: "system", 260: "eyeglass", 270: "candelabrum",
        280: "skylight", 290: "shower stall", 300: "trouser", 310: "dish", 320: "railroad train", 330: "mat",
    },
    "part": {
        0: "-", 10: "neck", 20: "back", 30: "license plate", 40: "balcony", 50: "plant", 60: "railing", 70: "knob",
        80: "tube", 90: "blade", 100: "upper sash", 110: "beam", 120: "sill", 130: "stabilizer", 140: "stem",
        150: "branch",
    },
    "material": {
        0: "-", 5: "fabric", 10: "hair", 15: "painted", 20: "skin", 25: "wood",
    },
    "texture": {
        0: "banded", 5: "chequered", 10: "dotted", 15: "gauzy", 20: "knitted", 25: "meshed", 30: "polka-dotted",
        35: "spiralled", 40: "studded", 45: "wrinkled",
    },
}
# Each object with parts, its name, and its first channel in the part head.
FIRST_CHANNELS = [
    (2, "sky", 0), (5, "building", 2), (6, "person", 26), (7, "ceiling", 41), (8, "table", 43), (9, "window", 54),
    (10, "road", 64), (12, "chair", 66), (13, "car", 77), (15, "painting", 90), (16, "door", 92), (18, "light", 100),
    (19, "cabinet", 106), (21, "lamp", 115), (28, "bed", 125), (29, "sofa", 134), (32, "shelf", 144),
    (33, "bottle", 148), (39, "mirror", 151), (42, "sink", 153), (43, "dog", 158), (44, "armchair", 169),
    (46, "wall socket", 180), (47, "sconce", 182), (48, "pillow", 186), (49, "cat", 188), (54, "clock", 198),
    (56, "column", 200), (57, "bicycle", 204), (59, "coffee table", 209), (61, "spotlight", 214), (67, "desk", 216),
    (68, "airplane", 220), (69, "bird", 230), (70, "house", 240), (74, "television", 249), (75, "chandelier", 251),
    (77, "pottedplant", 257), (80, "stairway", 260), (81, "van", 262), (82, "stove", 270), (83, "truck", 276),
    (85, "chest of drawers", 279), (87, "seat", 285), (89, "glass", 288), (91, "telephone", 293), (95, "monitor", 296),
    (98, "stool", 298), (104, "fan", 301), (105, "horse", 305), (106, "motorbike", 315), (108, "train", 319),
    (109, "bathtub", 325), (110, "toilet", 328), (111, "refrigerator", 332), (113, "wardrobe", 334),
    (117, "computer", 337), (120, "bus", 343), (122, "microwave", 351), (127, "swivel chair", 356),
    (131, "ottoman", 362), (141, "sheep", 366), (142, "cow", 376), (143, "bookcase", 386), (145, "exhaust hood", 388),
    (153, "coach", 391), (154, "dishwasher", 395), (160, "oven", 398), (161, "monitoring device", 401),
    (170, "pool table", 403), (180, "mug", 411), (184, "pitcher", 413), (204, "kitchen island", 415),
    (213, "buffet", 418), (214, "kettle", 421), (240, "washer", 423), (321, "lighthouse", 425),
]
# fmt: on
UNUSED_PARTS = {68: "stove", 106: "housing", 123: "trunk", 143: "panel", 145: "plate", 150: "branch", 152: "logo"}


def test_counts() -> None:
    assert TASKS == ("scene", "object", "part", "material", "texture")
    labels, parts = default_labels(), default_object_parts()
    assert tuple(labels) == TASKS
    assert {task: len(names) for task, names in labels.items()} == COUNTS
    assert len(parts) == 77
    assert sum(map(len, parts.values())) == 350
    assert sum(1 + len(numbers) for numbers in parts.values()) == 427


def test_names_stand_once_and_at_their_places() -> None:
    labels = default_labels()
    for task, names in labels.items():
        assert len(set(names)) == len(names), task
        assert all(name == name.strip() and name.isascii() for name in names), task
        assert {index: names[index] for index in MARKED[task]} == MARKED[task]
        assert ("-" in names) == (names[0] == "-") == (task in ("object", "part", "material")), task


def test_first_channels_of_the_objects_with_parts() -> None:
    labels, parts = default_labels(), default_object_parts()
    first, found = 0, []
    for number, numbers in parts.items():
        found.append((number, labels["object"][number], first))
        first += 1 + len(numbers)
    assert found == FIRST_CHANNELS


def test_parts_are_ascending_and_known() -> None:
    labels, parts = default_labels(), default_object_parts()
    assert list(parts) == sorted(parts)
    for number, numbers in parts.items():
        assert list(numbers) == sorted(set(numbers)), number
        assert numbers[0] > 0, number
        assert numbers[-1] < 153, number
    used = {part for numbers in parts.values() for part in numbers}
    assert {part: labels["part"][part] for part in range(1, 153) if part not in used} == UNUSED_PARTS
    airplane = ["wheel", "tail", "body", "wing", "stern", "engine", "fuselage", "stabilizer", "landing gear"]
    assert [labels["part"][part] for part in parts[labels["object"].index("airplane")]] == airplane


def test_each_call_returns_its_own_tables() -> None:
    default_labels()["scene"].clear()
    default_object_parts().clear()
    assert len(default_labels()["scene"]) == 365
    assert len(default_object_parts()) == 77
