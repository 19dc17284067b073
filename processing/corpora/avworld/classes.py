"""Object classes of AVWorld: sounding classes, silent objects, and their names.

The two classes of an acoustically ambiguous pair share a synthesiser. The two classes of a visually ambiguous pair
share a sprite. Nothing else is shared. In each pair, one class is three times as frequent as the other, so that the
best guess from one modality alone is correct in three of four cases.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class SoundingClass:
    """A class of sounding objects.

    Attributes:
        nouns: primary noun and at most one synonym.
        verbs: pairs of gerund and finite form.
        synthesiser: name of the synthesiser, a function of `synthesis`.
        sprite: name of the sprite in `sprites`.
        weight: relative frequency among sources.
        colour: most frequent colour.
        place: most frequent background.
        countable: True if the noun takes "a".
        plural: True if the noun takes "are".
    """

    nouns: tuple[str, ...]
    verbs: tuple[tuple[str, str], ...]
    synthesiser: str
    sprite: str
    weight: float
    colour: str
    place: str
    countable: bool = True
    plural: bool = False

    @property
    def name(self) -> str:
        """Name of the class in `labels` and `visible`, which is its primary noun."""
        return self.nouns[0]


def _sounding(
    nouns: str, verbs: str, synthesiser: str, sprite: str, weight: float, colour: str, place: str, **flags
) -> SoundingClass:
    pairs = tuple(tuple(pair.split()) for pair in verbs.split(", "))
    return SoundingClass(tuple(nouns.split(", ")), pairs, synthesiser, sprite, weight, colour, place, **flags)


# Weights are percentages of all sources, up to rounding. The most frequent classes are unambiguous; ambiguous pairs
# account for about a third.
SOUNDING_CLASSES: tuple[SoundingClass, ...] = (
    _sounding("dog, puppy", "barking barks, yapping yaps", "bark", "dog", 10.0, "orange", "grass"),
    _sounding("siren, ambulance", "wailing wails, blaring blares", "siren", "siren", 8.5, "red", "street"),
    _sounding("baby, infant", "crying cries, bawling bawls", "cry", "baby", 7.5, "yellow", "room"),
    _sounding("rooster, cockerel", "crowing crows, screeching screeches", "crow", "rooster", 6.5, "red", "grass"),
    _sounding("cat, kitten", "meowing meows, mewing mews", "meow", "cat", 6.0, "orange", "room"),
    _sounding("helicopter, chopper", "whirring whirrs, thudding thuds", "rotor", "helicopter", 5.2, "green", "sand"),
    _sounding("chainsaw, saw", "roaring roars, revving revs", "chainsaw", "chainsaw", 4.6, "orange", "snow"),
    _sounding("fire, campfire", "crackling crackles, popping pops", "crackle", "fire", 4.2, "red", "cave"),
    _sounding(
        "waves", "crashing crash, breaking break", "surf", "waves", 3.8, "blue", "sand", countable=False, plural=True
    ),
    _sounding("person, man", "sneezing sneezes, sniffling sniffles", "sneeze", "person", 3.4, "purple", "street"),
    _sounding("drum", "beating beats, thumping thumps", "drum", "drum", 3.0, "red", "cave"),
    _sounding("owl", "hooting hoots, calling calls", "hoot", "owl", 2.7, "purple", "snow"),
    # Acoustically ambiguous pairs, which share a synthesiser.
    _sounding(
        "rain, drizzle", "falling falls, pattering patters", "patter", "cloud", 4.8, "blue", "grass", countable=False
    ),
    _sounding("pan, skillet", "sizzling sizzles, frying fries", "patter", "pan", 1.6, "green", "room"),
    _sounding("car, automobile", "idling idles, rumbling rumbles", "engine", "car", 4.2, "green", "street"),
    _sounding("generator, dynamo", "humming hums, rumbling rumbles", "engine", "generator", 1.4, "yellow", "snow"),
    _sounding("kettle, teapot", "whistling whistles, boiling boils", "whistle", "kettle", 2.4, "purple", "room"),
    _sounding("train, locomotive", "whistling whistles, tooting toots", "whistle", "train", 0.8, "green", "snow"),
    _sounding("truck, lorry", "beeping beeps, reversing reverses", "beep", "truck", 1.8, "yellow", "street"),
    _sounding("microwave, oven", "beeping beeps, bleeping bleeps", "beep", "microwave", 0.6, "blue", "room"),
    # Visually ambiguous pairs, which share a sprite.
    _sounding("clock", "ticking ticks, tocking tocks", "tick", "clock", 3.6, "purple", "room"),
    _sounding("cuckoo", "cuckooing cuckoos, chiming chimes", "cuckoo", "clock", 1.2, "orange", "grass"),
    _sounding("sparrow", "chirping chirps, tweeting tweets", "chirp", "bird", 3.3, "yellow", "grass"),
    _sounding("canary", "trilling trills, singing sings", "trill", "bird", 1.1, "yellow", "room"),
    _sounding("telephone, landline", "ringing rings, jangling jangles", "ring", "phone", 3.0, "green", "room"),
    _sounding("smartphone, cellphone", "vibrating vibrates, buzzing buzzes", "buzz", "phone", 1.0, "blue", "street"),
    _sounding("church bell, belfry", "tolling tolls, pealing peals", "toll", "bell", 2.1, "yellow", "snow"),
    _sounding("handbell", "jingling jingles, tinkling tinkles", "jingle", "bell", 0.7, "purple", "cave"),
)

# Each silent object has a sprite of the same name.
SILENT_OBJECTS: tuple[str, ...] = (
    "balloon", "chair", "tree", "house", "flower", "cup", "hat", "umbrella", "ladder", "key",
)  # fmt: skip

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 15, 30),
    "green": (20, 225, 50),
    "blue": (40, 50, 245),
    "yellow": (255, 230, 0),
    "purple": (165, 0, 200),
    "orange": (255, 125, 0),
}


@dataclass(frozen=True)
class Background:
    """A background: its phrase in a caption, the word that identifies it, and its mean colour (RGB)."""

    phrase: str
    word: str
    colour: tuple[int, int, int]


BACKGROUNDS: dict[str, Background] = {
    "grass": Background("on grass", "grass", (30, 80, 40)),
    "snow": Background("in snow", "snow", (228, 232, 240)),
    "sand": Background("on sand", "sand", (196, 184, 158)),
    "street": Background("on a street", "street", (105, 108, 112)),
    "room": Background("in a room", "room", (120, 82, 66)),
    "cave": Background("in a cave", "cave", (22, 20, 28)),
}

CLASSES: dict[str, SoundingClass] = {sounding.name: sounding for sounding in SOUNDING_CLASSES}


def _pairs(attribute: str) -> tuple[tuple[str, str], ...]:
    groups: dict[str, list[str]] = {}
    for sounding in SOUNDING_CLASSES:
        groups.setdefault(getattr(sounding, attribute), []).append(sounding.name)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


ALIKE_SOUNDING: tuple[tuple[str, str], ...] = _pairs("synthesiser")
ALIKE_LOOKING: tuple[tuple[str, str], ...] = _pairs("sprite")

# The other class of each ambiguous pair.
RIVALS: dict[str, str] = {
    name: other for a, b in ALIKE_SOUNDING + ALIKE_LOOKING for name, other in ((a, b), (b, a))
}  # fmt: skip

# Classes that an image does not distinguish from another class.
LOOK_AMBIGUOUS: frozenset[str] = frozenset(name for pair in ALIKE_LOOKING for name in pair)


def sprite_of(name: str) -> str:
    """Name of the sprite of a sounding class or a silent object."""
    return CLASSES[name].sprite if name in CLASSES else name


def names(class_name: str) -> tuple[str, ...]:
    """Return all phrases that name a class or a silent object, the primary noun first.

    Match the phrases on whole words. No phrase of one class occurs as whole words in a phrase or verb of another.

    Raises:
        ValueError: if the class is unknown.
    """
    if class_name in CLASSES:
        return CLASSES[class_name].nouns
    if class_name in SILENT_OBJECTS:
        return (class_name,)
    raise ValueError(f"AVWorld has no class {class_name!r}; known: {', '.join((*CLASSES, *SILENT_OBJECTS))}")
