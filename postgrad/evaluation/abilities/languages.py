"""Questions in several languages, with answers in them, and the language of a text by its script and its function words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import regex

from postgrad.data.words import split_words


@dataclass(frozen=True)
class Language:
    """Subjects, places and questions, the same in each language and in the same order; each fits the others.

    `{x}` is a subject, `{X}` the same at the start of a sentence, `{p}` a place.
    """

    name: str
    """In English."""
    subjects: tuple[str, ...]
    places: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    """Questions, each with an answer."""


LANGUAGES: Mapping[str, Language] = MappingProxyType(
    {
        "en": Language(
            "English",
            ("the dog", "the cat", "the child", "the teacher", "the horse", "the neighbour", "the bird", "the doctor"),
            ("in the garden", "in the kitchen", "at the river", "on the bridge", "in the forest", "at the station"),
            (
                ("Where is {x}?", "{X} is {p}."),
                ("What is {x} doing {p}?", "{X} is sleeping {p}."),
                ("Is {x} {p}?", "Yes, {x} is {p}."),
                ("Who is {p}?", "I think that {x} is {p}."),
            ),
        ),
        "de": Language(
            "German",
            ("der Hund", "die Katze", "das Kind", "der Lehrer", "das Pferd", "die Nachbarin", "der Vogel", "die Ärztin"),
            ("im Garten", "in der Küche", "am Fluss", "auf der Brücke", "im Wald", "am Bahnhof"),
            (
                ("Wo ist {x}?", "{X} ist {p}."),
                ("Was macht {x} {p}?", "{X} schläft {p}."),
                ("Ist {x} {p}?", "Ja, {x} ist {p}."),
                ("Wer ist {p}?", "Ich glaube, {x} ist {p}."),
            ),
        ),
        "fr": Language(
            "French",
            ("le chien", "le chat", "l'enfant", "le professeur", "le cheval", "la voisine", "l'oiseau", "le médecin"),
            ("dans le jardin", "dans la cuisine", "près de la rivière", "sur le pont", "dans la forêt", "à la gare"),
            (
                ("Où est {x} ?", "{X} est {p}."),
                ("Que fait {x} {p} ?", "{X} dort {p}."),
                ("Est-ce que {x} est {p} ?", "Oui, {x} est {p}."),
                ("Qui est {p} ?", "Je crois que {x} est {p}."),
            ),
        ),
        "es": Language(
            "Spanish",
            ("el perro", "el gato", "el niño", "el profesor", "el caballo", "la vecina", "el pájaro", "la doctora"),
            ("en el jardín", "en la cocina", "junto al río", "en el puente", "en el bosque", "en la estación"),
            (
                ("¿Dónde está {x}?", "{X} está {p}."),
                ("¿Qué hace {x} {p}?", "{X} duerme {p}."),
                ("¿Está {x} {p}?", "Sí, {x} está {p}."),
                ("¿Quién está {p}?", "Creo que {x} está {p}."),
            ),
        ),
        "it": Language(
            "Italian",
            ("il cane", "il gatto", "il bambino", "il maestro", "il cavallo", "la vicina", "l'uccello", "il medico"),
            ("nel giardino", "nella cucina", "vicino al fiume", "sul ponte", "nella foresta", "alla stazione"),
            (
                ("Dove è {x}?", "{X} è {p}."),
                ("Che cosa fa {x} {p}?", "{X} dorme {p}."),
                ("È vero che {x} è {p}?", "Sì, {x} è {p}."),
                ("Chi è {p}?", "Credo che {x} sia {p}."),
            ),
        ),
        "nl": Language(
            "Dutch",
            ("de hond", "de kat", "het kind", "de leraar", "het paard", "de buurvrouw", "de vogel", "de dokter"),
            ("in de tuin", "in de keuken", "bij de rivier", "op de brug", "in het bos", "op het station"),
            (
                ("Waar is {x}?", "{X} is {p}."),
                ("Wat doet {x} {p}?", "{X} slaapt {p}."),
                ("Is {x} {p}?", "Ja, {x} is {p}."),
                ("Wie is {p}?", "Ik denk dat {x} {p} is."),
            ),
        ),
        "ru": Language(
            "Russian",
            ("собака", "кошка", "ребёнок", "учитель", "лошадь", "соседка", "птица", "врач"),
            ("в саду", "на кухне", "у реки", "на мосту", "в лесу", "на вокзале"),
            (
                ("Где {x}?", "{X} {p}."),
                ("Что делает {x} {p}?", "{X} спит {p}."),
                ("Правда, что {x} {p}?", "Да, {x} {p}."),
                ("Кто {p}?", "Я думаю, что {x} {p}."),
            ),
        ),
        "zh": Language(
            "Chinese",
            ("小狗", "小猫", "孩子", "老师", "马", "邻居", "小鸟", "医生"),
            ("在花园里", "在厨房里", "在河边", "在桥上", "在森林里", "在车站"),
            (
                ("{x}在哪里？", "{X}{p}。"),
                ("{x}{p}做什么？", "{X}{p}睡觉。"),
                ("{x}{p}吗？", "是的，{x}{p}。"),
                ("谁{p}？", "我想{x}{p}。"),
            ),
        ),
    }
)  # fmt: skip
"""By their ISO 639-1 code."""

_FUNCTION_WORDS: Mapping[str, frozenset[str]] = {
    code: frozenset(words.split())
    for code, words in {
        "en": (
            "the a an is are was were be been i you he she it we they of to and in on at that this these those with for from by"
            " not no yes but or as his her its their my your there what who where when which have has had do does did will"
            " would can could think"
        ),
        "de": (
            "der die das den dem des ein eine einen einem einer ist sind war waren sein ich du er sie es wir ihr und oder aber"
            " nicht kein keine ja nein in an im am zum zur auf mit von bei aus für über unter dass wo was wer wie hat haben"
            " wird werden kann auch noch schon glaube"
        ),
        "fr": (
            "le la les un une des du de est sont était je tu il elle nous vous ils elles et ou mais ne pas non oui dans sur"
            " sous avec pour par près au aux à que qui où quoi ce cette ces son sa ses mon ma mes a ont être avoir fait plus"
            " crois"
        ),
        "es": (
            "el la los las un una unos unas es son está están era yo tú él ella nosotros y o pero no sí en sobre con para por"
            " junto al del de que quién dónde qué este esta estos su sus mi mis tu ha han ser estar hay más creo cuando"
        ),
        "it": (
            "il lo la i gli le un uno una è sono era io tu lui lei noi voi e o ma non sì no nel nella nei sul sulla con per"
            " vicino al alla del della di che chi dove cosa questo questa suo sua mio mia ha hanno essere avere più anche"
            " credo sia"
        ),
        "nl": (
            "de het een is zijn was waren ik jij hij zij wij u en of maar niet geen ja nee in op bij met van voor naar uit"
            " over onder dat die deze dit wie waar wat hoe heeft hebben wordt worden kan ook nog al denk er te"
        ),
    }.items()
}
_SCRIPTS = {"ru": regex.compile(r"\p{Cyrillic}"), "zh": regex.compile(r"\p{Han}")}
_OTHER_SCRIPTS = regex.compile(r"\p{Hiragana}|\p{Katakana}|\p{Hangul}|\p{Arabic}|\p{Hebrew}|\p{Devanagari}|\p{Thai}")
_LETTER = regex.compile(r"\p{L}")
_SCRIPT_SHARE = 0.5


def detect_language(text: str) -> str | None:
    """The language of a text among `LANGUAGES`: that of the script of most letters, or with the most function words.

    None where two languages have equally many, or none has any. A list of function words tells languages of a sentence apart,
    not names and single words.
    """
    letters = len(_LETTER.findall(text))
    if not letters or len(_OTHER_SCRIPTS.findall(text)) > _SCRIPT_SHARE * letters:
        return None
    for code, script in _SCRIPTS.items():
        if len(script.findall(text)) > _SCRIPT_SHARE * letters:
            return None if _OTHER_SCRIPTS.search(text) else code
    words = split_words(text)
    counts = {code: sum(word in known for word in words) for code, known in _FUNCTION_WORDS.items()}
    first, second = sorted(counts.values(), reverse=True)[:2]
    return max(counts, key=counts.__getitem__) if first > second else None
