# ruff: noqa: RUF001  (letters of other scripts that look like Latin ones)
"""Which language a text is in, as far as its script and its commonest words tell.

A script of one language decides; Latin, Cyrillic, Arabic and Devanagari are told apart by letters
and words that one language has and its neighbours have not. Where that does not decide, nothing is
said. Languages are ISO 639-1 codes.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

_ALONE = {
    "GURMUKHI": "pa",
    "HANGUL": "ko",
    "THAI": "th",
    "TAMIL": "ta",
    "TELUGU": "te",
    "KANNADA": "kn",
    "GUJARATI": "gu",
    "BENGALI": "bn",
    "MALAYALAM": "ml",
    "HEBREW": "he",
    "GREEK": "el",
    "GEORGIAN": "ka",
    "ARMENIAN": "hy",
}
_JAPANESE = {"HIRAGANA", "KATAKANA"}
_WORDS = {
    "LATIN": {
        "en": "the and of to in is that it for was with you are this be have not",
        "de": "der die das und ist nicht ein eine ich sie mit zu den von auf für dem im",
        "fr": "le les des et est une dans que pour pas qui sur avec je vous au du il",
        "es": "el los las y es que una por con para no del se lo como está muy",
        "it": "il di che è non per una sono gli della con si nel più anche del ha",
        "pt": "os uma não com para é do da em que mais são você se ao dos foi",
        "nl": "het een en van niet dat ik zijn op voor met aan maar ook wordt",
        "pl": "i w nie na się że jest to z do jak ale o co są przez od dla",
        "fi": "ja on ei että se hän oli mutta kun ovat myös olla joka tämä hyvin",
        "sw": "na ya wa kwa ni katika za la kuwa hii yake hiyo au cha mimi sana",
        "vi": "và của là có không được một cho các trong với người những tôi này",
        "sv": "och att det som en är på för inte med av den till har ett jag",
        "tr": "ve bir bu için ile çok da de olarak daha gibi ne var ama",
        "id": "dan yang di ini itu dengan untuk tidak dari dalam adalah saya akan",
    },
    "CYRILLIC": {
        "ru": "и в не на что он с как это я по но все она так его из был эта",
        "uk": "і в не на що він з як це я та але є до від який також ми її",
        "bg": "и в не на че той с как това аз за но са да е от се към която",
    },
    "ARABIC": {
        "ar": "في من على أن إلى هذا التي كان لا عن مع هذه الذي هو ما",
        "fa": "و در به از که این را با است برای آن یک می های",
        "ur": "کے میں کی ہے اور سے کا کو پر نے یہ ہیں کہ ایک تھا",
    },
    "DEVANAGARI": {
        "hi": "है के में की से का को और हैं पर ने यह एक नहीं था कि",
        "mr": "आहे आणि या च्या ते मध्ये हे नाही होते आहेत एक तो मी होता केले",
        "ne": "छ र को मा हो लागि पनि गर्न छन् एक यो भएको गर्ने थियो तर",
    },
}
_LETTERS = {"fa": "پچژگ", "ur": "ٹڈڑےںھ", "uk": "іїєґ", "ru": "ыэё", "pl": "łąęśż", "vi": "ơưđạảấ"}
_LEAST = 2  # words of a language that must be there, and more than of any other


def language_of(text: str) -> str | None:
    """The code of the language, or None where it cannot be told."""
    scripts = Counter(
        name.partition(" ")[0] for c in text if c.isalpha() and (name := unicodedata.name(c, ""))
    )
    if not scripts:
        return None
    if sum(scripts[name] for name in _JAPANESE) * 10 > scripts.total():
        return "ja"
    script, count = scripts.most_common(1)[0]
    if count * 2 < scripts.total():
        return None
    if script == "CJK":
        return "zh"
    return _ALONE.get(script) or _by_words(text.lower(), _WORDS.get(script, {}))


def _by_words(text: str, known: dict[str, str]) -> str | None:
    # of Indic words the vowel signs are marks, not letters
    words = Counter(re.findall(r"[^\W\d_](?:[^\W\d_]|[\u0300-\u036f\u0900-\u097f])*", text))
    found = {
        language: sum(words[word] for word in set(common.split()))
        + sum(text.count(letter) for letter in _LETTERS.get(language, ""))
        for language, common in known.items()
    }
    (first, most), (_, second) = [*Counter(found).most_common(2), ("", 0), ("", 0)][:2]
    return first if most >= _LEAST and most > second else None


def is_language(text: str, code: str) -> bool | None:
    """Whether the text is in that language; None where that cannot be told."""
    known = {*_ALONE.values(), "ja", "zh", *(code for words in _WORDS.values() for code in words)}
    found = language_of(text)
    return None if found is None or code not in known else found == code
