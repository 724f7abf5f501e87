"""Words that probes are made of: common English words by category, names, and syllables of words that do not exist."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

CATEGORIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "an animal": ("horse", "rabbit", "eagle", "spider", "whale", "goat", "beaver", "parrot", "lizard", "donkey"),
        "a colour": ("green", "purple", "yellow", "brown", "violet", "black", "white", "blue", "grey", "red"),
        "a food": ("bread", "cheese", "soup", "rice", "butter", "honey", "noodles", "porridge", "salad", "cake"),
        "a tool": ("hammer", "shovel", "saw", "drill", "chisel", "pliers", "rake", "axe", "wrench", "broom"),
        "a part of the body": ("elbow", "shoulder", "knee", "ankle", "finger", "wrist", "neck", "thumb", "chin", "heel"),
        "a piece of clothing": ("jacket", "scarf", "trousers", "glove", "shirt", "sock", "coat", "skirt", "vest", "belt"),
        "a vehicle": ("train", "bicycle", "tractor", "lorry", "ferry", "tram", "canoe", "sledge", "van", "wagon"),
    }
)  # fmt: skip
"""No word is in two categories."""

NOUNS = (
    "gardener", "baker", "teacher", "sailor", "painter", "farmer", "doctor", "singer", "driver", "miner", "lamp", "river",
    "stone", "window", "basket", "letter", "bridge", "candle", "mirror", "ladder", "violin", "bottle", "garden", "island",
    "castle", "market", "valley", "village", "kettle", "blanket",
)  # fmt: skip
ADJECTIVES = (
    "old", "young", "quiet", "clever", "tall", "tired", "brave", "gentle", "busy", "hungry", "small", "heavy", "broken",
    "wooden", "golden", "empty", "bright", "narrow", "round", "silent",
)  # fmt: skip
VERBS = (
    "carries", "finds", "paints", "repairs", "sells", "hides", "cleans", "watches",
    "forgets", "borrows", "draws", "likes",
)  # fmt: skip
TIMES = ("today", "tonight", "again", "slowly", "carefully", "outside", "alone", "together", "twice", "happily")
NAMES = (
    "Ada", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Kira", "Leo", "Mara", "Nils",
    "Olga", "Paul", "Rosa", "Simon", "Tara", "Viktor",
)  # fmt: skip
SYLLABLES = (
    "ba", "do", "fi", "ka", "lu", "me", "no", "pi", "ra", "su", "ta", "vo", "we", "zi",
    "gre", "plo", "tri", "sna",
)  # fmt: skip
