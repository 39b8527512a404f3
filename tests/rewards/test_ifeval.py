# ruff: noqa: RUF001  (letters of other scripts that look like Latin ones)
"""Instructions: for each kind a text that keeps it and one that does not."""

from __future__ import annotations

import json

import pytest

from posttrain.rewards.ifeval import IFEval
from posttrain.rewards.instructions import INSTRUCTIONS, follows, sentences
from posttrain.rewards.languages import is_language, language_of
from tests.rewards.rollouts import rollout

MANY = {"relation": "at least"}
FEW = {"relation": "less than"}
KINDS = [
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "at least", "capital_frequency": 2},
        "This is VERY BIG",
        "This is VERY big",
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "less than", "capital_frequency": 2},
        "Only ONE here",
        "NOT ONE here",
    ),
    ("change_case:english_capital", {}, "HELLO, YOU 2!", "HELLO, you"),
    ("change_case:english_lowercase", {}, "hello, you 2!", "Hello"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say a.\n"}, "say a. A", "A. Say a."),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("combination:two_responses", {}, "******\none\n******\ntwo", "one ****** two ****** three"),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        "[name], [address]",
        "[name] []",
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. Hi", "Bye PS."),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "A\n\nP.P.S. b", "P.S. b"),
    (
        "detectable_format:constrained_response",
        {},
        "My answer is no.",
        "My answer is yes. My answer is no.",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{'a': 1}"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Day", "num_sections": 2},
        "Day 1\nGo.\nDay 2\nStay.",
        "Day 1\nGo.\nDay two",
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        "List:\n* a\n- b\n**bold**",
        "* a\n* b\n* c",
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*one* and **two**",
        "*one* and * *",
    ),
    ("detectable_format:title", {}, "<<A poem>>\nx", "<< >>\nx"),
    ("keywords:existence", {"keywords": ["cat", "Dog"]}, "Cats and dogs", "cats"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "a CAT!"),
    ("keywords:frequency", {"keyword": "a b", "frequency": 2, **MANY}, "A b a b", "a b"),
    ("keywords:frequency", {"keyword": "no", "frequency": 2, **FEW}, "no", "no no"),
    (
        "keywords:letter_frequency",
        {"letter": "o", "let_frequency": 3, "let_relation": "at least"},
        "Ooo",
        "oO",
    ),
    ("language:response_language", {"language": "ko"}, "안녕하세요", "Hello, the end is near"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "jasper"},
        "One.\n\n*Jasper*, two.",
        "Jasper.\n\nTwo.",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "one"},
        "One.\n\nTwo.",
        "One.\n\nTwo.\n\nThree.",
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "a\n***\nb",
        "a\n***\n***\nb",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, **FEW},
        "Mr. Smith paid $3.50. He left!",
        "One. Two. Three.",
    ),
    ("length_constraints:number_words", {"num_words": 3, **MANY}, "it's well-known now", "it's -"),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
    ("startend:end_checker", {"end_phrase": "The end."}, 'x "the end." ', "The end. x"),
    ("startend:quotation", {}, ' "all of it" ', '"some" of it'),
]


@pytest.mark.parametrize(("name", "given", "kept", "broken"), KINDS)
def test_each_kind(name, given, kept, broken):
    assert follows(kept, name, given) is True
    assert follows(broken, name, given) is False
    assert follows(" ", name, given) is False, "an empty answer keeps nothing"


def test_every_kind_of_the_data_is_there_and_tried(data_dir):
    lines = (data_dir / "data/ifeval/input_data_shared.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {name for row in rows for name in row["instruction_id_list"]} <= set(INSTRUCTIONS)
    assert {name for name, *_ in KINDS} == set(INSTRUCTIONS)
    part = IFEval()
    for row in rows:  # every argument is read
        answer = {key: row[key] for key in ("instruction_id_list", "kwargs")}
        value = part(rollout("Lorem ipsum, dolor sit amet.", answer))
        assert value is None or 0 <= value <= 1


def test_share_all_and_what_cannot_be_checked():
    names = ["punctuation:no_comma", "change_case:english_lowercase", "language:response_language"]
    answer = {"instruction_id_list": names, "kwargs": [{}, {}, {"language": "tlh"}]}
    assert IFEval()(rollout("No comma", answer)) == 0.5
    assert IFEval(all=True)(rollout("No comma", answer)) == 0.0
    assert IFEval(all=True)(rollout("no comma", answer)) == 1.0
    only = {"instruction_id_list": names[2:], "kwargs": [{"language": "tlh"}]}
    assert IFEval()(rollout("nuqneH", only)) is None
    assert IFEval(key="check")(rollout("no", {"check": answer})) == 1.0
    assert IFEval()(rollout("x")) is None


def test_loose_reading():
    answer = {"instruction_id_list": ["startend:quotation"], "kwargs": [{}]}
    text = 'Sure, here you are:\n"a poem"\nEnjoy!'
    assert IFEval()(rollout(text, answer)) == 0.0
    assert IFEval(loose=True)(rollout(text, answer)) == 1.0


def test_what_is_wrong_with_a_prompt():
    with pytest.raises(ValueError, match="no instruction 'x:y'; there are change_case"):
        follows("a", "x:y", {})
    with pytest.raises(ValueError, match="'keywords:existence' needs the argument 'keywords'"):
        follows("a", "keywords:existence", {})
    with pytest.raises(ValueError, match="relation 'about'"):
        follows("a", "length_constraints:number_words", {"relation": "about", "num_words": 3})
    with pytest.raises(ValueError, match="lists of one length"):
        IFEval()(rollout("a", {"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}))


def test_sentences():
    assert sentences("One. Two! Three? Four...") == 4
    assert sentences("Dr. Who met J. K. at 3.15 p.m. today.") == 1
    assert sentences('He said: "Go." She went.') == 2
    assert sentences("A title\n\nA line. And more") == 3
    assert sentences("***\n- - -") == 0


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("en", "This is the story of a man that you have not met."),
        ("de", "Das ist die Geschichte von einem Mann, der nicht mit uns ist."),
        ("fr", "C'est une histoire dans la ville, et les gens ne sont pas avec nous."),
        ("es", "Los perros y las gatas son de una familia que no está con nosotros."),
        ("it", "Questa è la storia di una donna che non ha più gli anni."),
        ("pt", "Não é uma história que os homens contam para você."),
        ("pl", "To nie jest książka, że się o tym mówi."),
        ("fi", "Hän ei ole täällä, mutta se on hyvin kaunis ja että."),
        ("sw", "Habari ya asubuhi, mimi ni mtu wa kwanza katika nchi hii."),
        ("vi", "Tôi không có một con mèo và những người này là của tôi."),
        ("ru", "Это был очень хороший день, и он не знал, что она так думает."),
        ("uk", "Це не він, але я та ми є тут, і вона також."),
        ("bg", "Това не е той, но да се каже, че са от тук."),
        ("ar", "هذا هو البيت الذي كان في المدينة من قبل"),
        ("fa", "این یک داستان است که برای آن را می گویند"),
        ("ur", "یہ ایک کہانی ہے اور اس میں بہت سے لوگ ہیں"),
        ("hi", "यह एक कहानी है और इस में बहुत से लोग हैं"),
        ("mr", "हे एक घर आहे आणि ते आहेत"),
        ("ne", "यो एक घर हो र यो राम्रो छ"),
        ("ja", "これは本です。"),
        ("zh", "这是一本书。"),
        ("pa", "ਸਤ ਸ੍ਰੀ ਅਕਾਲ"),
        ("th", "สวัสดี"),
        ("el", "Καλημέρα"),
    ],
)
def test_languages(code, text):
    assert language_of(text) == code
    assert is_language(text, code) is True
    assert is_language(text, "kn") is False


def test_what_cannot_be_told_is_not():
    assert language_of("Xyzzy plugh") is None
    assert language_of("123 !") is None
    assert is_language("Xyzzy plugh", "en") is None
    assert is_language("This is the end of it", "tlh") is None
