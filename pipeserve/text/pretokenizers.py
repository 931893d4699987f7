"""How byte-level BPE vocabularies cut text before merging, by their name in tokenizer.ggml.pre.

The names, and which patterns they stand for, are llama.cpp's (src/llama-vocab.cpp); where it
adapts a pattern to its regex engine, the pattern of the models' own tokenizer.json is used.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """Text is cut by each pattern in turn: matches, and what lies between them, become pieces."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A piece that is a token as it stands is taken without looking at the merges."""
    add_bos: bool = False
    """Whether prompts begin with BOS where the file does not say."""
    normalise_nfc: bool = False
    """Text is brought to Unicode's composed form first, as the models' tokenizer.json asks."""


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}|{_PUNCTUATION}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED_CODER = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕ"
    "ἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳ"
    "Ꙁ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
"""DeepSeek-LLM lists the letters with case itself, and not all of them."""

_SINGLE_DIGITS = PreTokenizer(patterns=(r"\p{N}", _GPT2))
_PLAIN_GPT2 = PreTokenizer(patterns=(_GPT2,))
_PLAIN_LLAMA3 = PreTokenizer(patterns=(_LLAMA3,))

_KINDS: dict[tuple[str, ...], PreTokenizer] = {
    ("default",): PreTokenizer(
        patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
    ),
    ("gpt-2", "phi-2", "mpt", "jais", "trillion", "gigachat", "a.x-4.0", "mellum"): _PLAIN_GPT2,
    ("granite-docling", "exaone4"): _PLAIN_GPT2,
    ("olmo",): PreTokenizer(patterns=(_GPT2,), normalise_nfc=True),
    ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"): _SINGLE_DIGITS,
    ("mellum2",): _SINGLE_DIGITS,
    ("command-r",): PreTokenizer(patterns=(r"\p{N}", _GPT2), normalise_nfc=True),
    (
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
        "lfm2",
    ): PreTokenizer(patterns=(_LLAMA3,), ignore_merges=True, add_bos=True),
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): _PLAIN_LLAMA3,
    ("qwen2", "deepseek-r1-qwen"): PreTokenizer(patterns=(_QWEN2,), normalise_nfc=True),
    ("qwen35",): PreTokenizer(patterns=(_QWEN35,), normalise_nfc=True),
    ("stablelm2", "hunyuan", "solar-open", "grok-2", "megrez", "kormo"): PreTokenizer(
        patterns=(_QWEN2,)
    ),
    ("tekken",): PreTokenizer(patterns=(_TEKKEN,), ignore_merges=True, add_bos=True),
    ("gpt-4o", "llama4", "kanana2", "minimax-m2", "talkie"): PreTokenizer(patterns=(_GPT4O,)),
    ("deepseek-llm",): PreTokenizer(
        patterns=(
            r"[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            r"[一-龥ࠀ-一가-퟿]+",
            r"\p{N}+",
        )
    ),
    ("deepseek-coder",): PreTokenizer(
        patterns=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")
    ),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm"): PreTokenizer(
        patterns=(r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_V3)
    ),
    ("falcon",): PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    ("bailingmoe", "bailingmoe2", "llada-moe"): PreTokenizer(patterns=(_BAILING,)),
    ("seed-coder",): PreTokenizer(patterns=(_SEED_CODER,)),
    ("poro-chat", "bloom", "gpt3-finnish"): PreTokenizer(patterns=(r" ?[^(\s|.,!?…。，、।۔،)]+",)),
    ("viking",): PreTokenizer(patterns=(r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}")),
}

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    name: kind for names, kind in _KINDS.items() for name in names
}
