"""A word is a word in every language: every text measure, filter and retrieval counts it."""

from __future__ import annotations

import random
import unicodedata

import numpy as np
import pytest
import regex
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data import words
from postgrad.data.filter.contamination import measure_overlap
from postgrad.data.filter.data_selection import find_near_duplicates, importance_weights, target_counts
from postgrad.data.read.documents import Document
from postgrad.data.read.examples import make_example
from postgrad.data.render.demonstrations import Demonstrations
from postgrad.data.render.renderers import PlainRenderer
from postgrad.data.words import separate_words, split_spaces, split_words, split_words_and_signs
from postgrad.evaluation.generation_metrics import (
    METRICS,
    MetricName,
    TaskPredictions,
    choose_bleu_tokenizer,
    count_without_words,
    metric_summary,
    tokenizer_names,
)

# A sentence, the same with another last word, and one about something else.
SENTENCES = {
    "English": (
        "my grandmother waters the roses behind the house",
        "my grandmother waters the roses behind the fence",
        "two boats lie empty on the river since Monday",
    ),
    "German": (
        "meine Großmutter gießt früh die Rosen hinter dem Häuschen",
        "meine Großmutter gießt früh die Rosen hinter dem Zaun",
        "zwei Kähne liegen seit Montag leer am Fluss",
    ),
    "Russian": (
        "моя бабушка поливает розы за старым домом",
        "моя бабушка поливает розы за старым забором",
        "две пустые лодки стоят у реки с понедельника",
    ),
    "Greek": (
        "η γιαγιά μου ποτίζει τα τριαντάφυλλα πίσω από το σπίτι",
        "η γιαγιά μου ποτίζει τα τριαντάφυλλα πίσω από το τείχος",
        "δύο άδειες βάρκες μένουν στο ποτάμι",
    ),
    "Korean": (
        "우리 할머니는 아침마다 집 뒤에서 장미에 물을 주신다",
        "우리 할머니는 아침마다 집 뒤에서 장미에 물을 뿌린다",
        "빈 배 두 척이 월요일부터 강가에 있다",
    ),
    "Arabic": (
        "جدَّتي تسقي الورودَ كلَّ صباحٍ خلف البيت",
        "جدَّتي تسقي الورودَ كلَّ صباحٍ خلف السور",
        "قاربان فارغان على النهر منذ الاثنين",
    ),
    "Hebrew": (
        "סָבְתָא שלי משקה את הוורדים מאחורי הבית",
        "סָבְתָא שלי משקה את הוורדים מאחורי הגדר",
        "שתי סירות ריקות עומדות בנהר מיום שני",
    ),
    "Hindi": (
        "मेरी दादी हर सुबह घर के पीछे गुलाबों को पानी देती हैं",
        "मेरी दादी हर सुबह घर के पीछे गुलाबों को पानी पिलाती हैं",
        "सोमवार से नदी पर दो खाली नावें खड़ी हैं",
    ),
    "Tamil": (
        "என் பாட்டி தினமும் வீட்டின் பின்னால் ரோஜாக்களுக்கு நீர் ஊற்றுகிறார்",
        "என் பாட்டி தினமும் வீட்டின் பின்னால் ரோஜாக்களுக்கு நீர் தெளிக்கிறார்",
        "இரண்டு காலிப் படகுகள் ஆற்றில் நிற்கின்றன",
    ),
    "Chinese": (
        "我奶奶每天早上在屋后给玫瑰浇水",
        "我奶奶每天早上在屋后给玫瑰修枝",
        "两条空船从星期一起停在河边",
    ),
    "Japanese": (
        "祖母は毎朝家の裏でバラに水をやります",
        "祖母は毎朝家の裏でバラに肥料をやります",
        "空のボートが二隻月曜から川にあります",
    ),
    "Thai": (
        "คุณยายรดน้ำกุหลาบหลังบ้านทุกเช้า",
        "คุณยายตัดกิ่งกุหลาบหลังบ้านทุกเช้า",
        "เรือเปล่าสองลำจอดอยู่ริมแม่น้ำ",
    ),
    "Khmer": (
        "យាយខ្ញុំស្រោចផ្កាកុលាបក្រោយផ្ទះរាល់ព្រឹក",
        "យាយខ្ញុំកាត់ផ្កាកុលាបក្រោយផ្ទះរាល់ព្រឹក",
        "ទូកទទេពីរចតនៅមាត់ទន្លេ",
    ),
}
UNSPACED = ("Chinese", "Japanese", "Thai", "Khmer")
WORD_METRICS: tuple[MetricName, ...] = ("exact-match", "F1", "ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU", "chrF")

each_language = pytest.mark.parametrize("language", SENTENCES)


def measured(name: MetricName, said: str, reference: str) -> float:
    return metric_summary(name, TaskPredictions(((said,) * 3,), ((reference,),) * 3))["value"]


def prose(language: str, seed: int, count: int) -> str:
    """A text of random words of a language, written as it is written there."""
    vocabulary = split_words(" ".join(SENTENCES[language]))
    return ("" if language in UNSPACED else " ").join(random.Random(seed).choices(vocabulary, k=count))


# --- words -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Can't stop, A1 foo_bar", ["can", "t", "stop", "a1", "foo", "bar"]),
        ("für die Größe", ["für", "die", "größe"]),
        ("हिन्दी में रोटी", ["हिन्दी", "में", "रोटी"]),
        ("السَّجادة", ["السَّجادة"]),
        ("می‌خواهم بروم", ["می‌خواهم", "بروم"]),
        ("猫坐在这里。GPU很快", ["猫", "坐", "在", "这", "里", "gpu", "很", "快"]),
        ("コンピューターを買う", ["コンピューター", "を", "買", "う"]),
        ("สื่อนี้", ["สื่", "อ", "นี้"]),
        ("cafe\u0301", ["café"]),
        ("❤️ 👍🏽 !?", []),
    ],
)
def test_words_of_a_text(text: str, expected: list[str]) -> None:
    assert split_words(text) == expected
    assert (
        " ".join(separate_words(text)).replace("'", " ").replace("_", " ").replace(",", " ").split()[: len(expected)]
        == expected
    )


_LETTER, _INSIDE = r"[\p{L}\p{N}]", r"[\p{L}\p{N}\p{M}\u200c\u200d]"


@settings(deadline=None, max_examples=300)
@given(
    st.text(
        st.sampled_from(
            "ab1 .'_-é\u0301²ßяא\u05b0ك\u0651कि\u094dपா漢字かなカーナ한글ไ\u0e35ខ\u17d2ម\u200c\u200d\u00ad❤\ufe0f"
        ),
        max_size=24,
    )
)
def test_words_are_those_between_the_boundaries_of_unicode(text: str) -> None:
    """Whichever of the two ways is taken, the words are runs of letters that no boundary of the library divides."""
    text = unicodedata.normalize("NFC", text.lower())
    pieces = regex.split(r"(?wV1)\b", text)
    expected = [word for piece in pieces for word in regex.findall(rf"{_LETTER}{_INSIDE}*", piece)]
    assert split_words(text) == expected
    assert [word for word in split_words_and_signs(text.replace("_", " ")) if regex.match(_LETTER, word)] == expected


def test_in_english_the_words_and_signs_are_those_of_nltk() -> None:
    from nltk.tokenize import wordpunct_tokenize

    text = "It's (perhaps) 3.14 -- or: nearly_so... O'Neill's café, “quoted”"
    assert split_words_and_signs(text) == wordpunct_tokenize(text.lower())


def test_a_long_text_has_the_same_words_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(sentence for those in SENTENCES.values() for sentence in those)
    whole = split_words(text)
    monkeypatch.setattr(words, "_CHUNK", 64)
    assert split_words(text) == whole
    assert " ".join(separate_words(text)).split() == whole


def test_parts_between_spaces_stay_whole_where_there_are_spaces() -> None:
    assert split_spaces("don't x.y 你好 GPU加速") == ["don't", "x.y", "你", "好", "gpu", "加", "速"]


# --- measures of answers -------------------------------------------------------------------------------------------------


@each_language
@pytest.mark.parametrize("name", WORD_METRICS)
def test_the_reference_scores_the_maximum_and_a_changed_copy_less(language: str, name: MetricName) -> None:
    reference, changed, other = SENTENCES[language]
    top = METRICS[name].scale
    assert measured(name, reference, reference) == pytest.approx(top)
    assert measured(name, reference, unicodedata.normalize("NFD", reference)) == pytest.approx(top)
    near = measured(name, changed, reference)
    assert near < top
    if name != "exact-match":
        assert measured(name, other, reference) < near


@each_language
def test_a_full_stop_of_the_script_is_no_part_of_an_answer(language: str) -> None:
    reference = SENTENCES[language][0]
    stop = {"Hindi": "।", "Chinese": "。", "Japanese": "。", "Arabic": "؟", "Khmer": "។"}.get(language, ".")
    for name in ("exact-match", "F1", "ROUGE-L"):
        assert measured(name, reference + stop, reference) == 1


def test_bleu_has_sacrebleus_tokenizer_of_the_script() -> None:
    names = {language: choose_bleu_tokenizer(those[:1]) for language, those in SENTENCES.items()}
    assert {language for language, name in names.items() if name != "13a"} == set(UNSPACED)
    assert names["Chinese"] == "zh" and names["Japanese"] == names["Thai"] == "char"
    assert choose_bleu_tokenizer(["the city of 北京 in winter"]) == "13a"
    for language, tokenizer in names.items():
        reference, changed, other = SENTENCES[language]
        own = metric_summary("BLEU", TaskPredictions(((changed, other),), ((reference,), (other,))))["value"]
        assert own == pytest.approx(
            sacrebleu.corpus_bleu([changed, other], [[reference, other]], tokenize=tokenizer).score
        )
    references = [[those[0]] for those in SENTENCES.values()]
    assert tokenizer_names("BLEU", references) == ["13a", "char", "zh"] and not tokenizer_names("F1", references)
    said = [those[0] for those in SENTENCES.values()]
    assert metric_summary("BLEU", TaskPredictions((tuple(said),), tuple(map(tuple, references))))[
        "value"
    ] == pytest.approx(100)


def test_references_without_words_are_counted_and_compared_as_a_whole() -> None:
    references = [["🐈"], ["🐕"], ["the cat"]]
    assert [count_without_words(name, references) for name in ("ROUGE-1", "ROUGE-L", "BLEU")] == [2, 2, 0]
    answers = TaskPredictions((("🐈", "🐈", "the cat"),), tuple(map(tuple, references)))
    assert metric_summary("ROUGE-L", answers)["value"] == pytest.approx(2 / 3)


# --- filters and retrieval -------------------------------------------------------------------------------------------------


def count_new(language: str) -> int:
    """Of eight texts and a near copy of each, those that are taken for new."""
    texts = [prose(language, seed, 200) for seed in range(8)]
    copies = [f"{text[:-12]} — {prose(language, 90 + number, 3)}!" for number, text in enumerate(texts)]
    return int((find_near_duplicates([*texts, *copies], 0.7) < 0).sum())


def share_found(language: str) -> float:
    """The mean share of eight held-out texts that is found in training text, where each is quoted with other signs."""
    held = [prose(language, seed, 60) for seed in range(8)]
    training = [f"{prose(language, 50 + n, 40)} «{text}» {prose(language, 70 + n, 40)}" for n, text in enumerate(held)]
    report = measure_overlap(
        [Document(text, None, f"held:{n}") for n, text in enumerate(held)],
        [Document(text, None, f"training:{n}") for n, text in enumerate(training)],
    )
    return float(report.shares.mean())


@each_language
def test_near_copies_are_found(language: str) -> None:
    assert count_new(language) == 8


@each_language
def test_held_out_text_is_found_in_training_text(language: str) -> None:
    assert share_found(language) == 1


@each_language
def test_demonstrations_are_those_with_common_words(language: str) -> None:
    reference, changed, other = SENTENCES[language]
    pool = [make_example("completion", {"prompt": text, "completion": "x"}, "pool") for text in (other, reference)]
    demonstrations = Demonstrations(PlainRenderer(), pool, 1, "bm25", 10**6, len)
    asked = make_example("completion", {"prompt": f"({changed})", "completion": "y"}, "asked")
    assert demonstrations.select(asked)[0].fields["prompt"] == reference


@each_language
def test_selection_prefers_text_with_the_words_of_the_target(language: str) -> None:
    about, _, other = SENTENCES[language]
    draw = random.Random(3)

    def text(sentence: str) -> str:
        return ("" if language in UNSPACED else " ").join(draw.choices(split_words(sentence), k=40))

    texts = [text(about) if number % 2 else text(other) for number in range(20)]
    weights = importance_weights(texts, target_counts((text(about) for _ in range(40)), "target"))
    chosen = np.argsort(-weights.nats_per_ngram_N)[:10]
    assert (chosen % 2 == 1).all()


def test_words_of_python_alone_would_find_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: a text without spaces is one word, and marks divide words."""
    monkeypatch.setattr(words, "_is_irregular", lambda text: False)
    assert split_words("हिन्दी") != ["हिन्दी"]
    monkeypatch.setattr("tests.data.test_words.split_words", lambda text: [*text.replace(" ", "")])
    assert count_new("Chinese") == 16 and share_found("Thai") < 0.5
    assert measured("ROUGE-1", *SENTENCES["Japanese"][:2]) == 0
