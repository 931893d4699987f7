"""Texts that tokenizers get wrong: scripts, code, emoji, white space, control codes, digits."""

from __future__ import annotations

SCRIPTS = {
    "english": "The quick brown fox doesn't jump; they've said it'll rain. I'm sure SHE'S HERE'LL",
    "german": "Größe, Übermut und ein Straßenfest – „schön“, nicht wahr?",
    "french": "L’été à Noël : « ça va ? » – l'œuvre coûte 3,50 €",
    "czech": "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "vietnamese": "Tiếng Việt có nhiều dấu thanh điệu khác nhau",
    "turkish": "İstanbul'da ılık bir ışık, ŞİİR ve öğüt",
    "greek": "Η γρήγορη αλεπού πηδάει πάνω από τον σκύλο",
    "russian": "Съешь ещё этих мягких французских булок, да выпей чаю",
    "hebrew": "שָׁלוֹם עולם, מה נשמע?",
    "arabic": "مرحبا بالعالم، كيف حالك؟ ١٢٣",
    "persian": "می‌خواهم کتاب‌ها را بخوانم",
    "hindi": "नमस्ते दुनिया, आप कैसे हैं? क्षत्रिय",
    "bengali": "আমার সোনার বাংলা, আমি তোমায় ভালোবাসি",
    "tamil": "வணக்கம் உலகம்",
    "thai": "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง",
    "georgian": "გამარჯობა მსოფლიო",
    "armenian": "Բարեւ աշխարհ",
    "amharic": "ሰላም ለዓለም",
    "khmer": "សួស្តី​ពិភពលោក",
    "tibetan": "བཀྲ་ཤིས་བདེ་ལེགས།",
    "chinese": "你好，世界！今天天气怎么样？漢字繁體",
    "japanese": "こんにちは世界。カタカナとｶﾀｶﾅ、漢字と「引用」",
    "korean": "안녕하세요 세계, 한국어 문장입니다",
    "korean jamo": "한글",
    "mixed": "naïve 東京 Москва 123 العربية mixed-in_one line",
    "rare planes": "𐍈𐌰𐌹 𒀀𒁀 𓀀𓁐 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 🄰 ꧁꧂",
    "combining": "e\u0301 a\u0308\u0323 Z\u0351\u036b\u0343a\u0306lgo q\u0307",
    "composed and not": "é e\u0301 Å A\u030a ﬁ ﬃ ² ½ Ⅷ",
}

CODE = {
    "python": "def f(x: int) -> str:\n    if x > 0:\n\t\treturn f'{x!r:>10}'\n    return \"\"\n",
    "c": '#include <stdio.h>\nint main(void)\n{\n  for (;;) { printf("%d\\n", 1<<2); }\n}\n',
    "json": '{"a": [1, 2.5e-3, null, true], "b": {"c": "\\u00e9\\n"}}',
    "html": "<!doctype html><table><tr><td>a</td></tr></table><br/>&amp;&#x41;",
    "shell": "ls -la | grep '^d' && echo \"$HOME/${x:-y}\" > /dev/null 2>&1",
    "tex": r"\frac{\partial f}{\partial x} = \sum_{i=1}^{n} x_i^2",
    "makefile": "all:\n\tcc -o a a.c\n\t\t# tabs\n",
    "symbols": "a!=b, c<=d, e=>f, g::h, i->j, k++, --l, m**n, //o, /*p*/, ###, ~~~, ```",
    "camel": "parseHTTPResponse_v2 fooBarBAZ XMLHttpRequest __init__ snake_case kebab-case",
    "url": "https://example.org:8080/a/b.html?q=1&r=%20#top",
}

EMOJI = {
    "plain": "🙂😀🎉🔥",
    "family": "👨‍👩‍👧‍👦 and 👩🏽‍💻",
    "flags": "🇩🇪🇯🇵🏴󠁧󠁢󠁳󠁣󠁴󠁿🏳️‍🌈",
    "keycaps": "1️⃣#️⃣ ❤️ ❤ ☺︎",
    "between words": "a🙂b 🙂 c🙂 🙂d",
}

WHITE_SPACE = {
    "empty": "",
    "space": " ",
    "two spaces": "  ",
    "leading": " a",
    "two leading": "  a",
    "trailing": "a ",
    "trailing run": "a    ",
    "inner run": "a   b    c     d",
    "runs of many lengths": "".join(f"x{' ' * n}" for n in range(1, 40)),
    "tabs": "\t\ta\tb\t",
    "newline": "\n",
    "newlines": "a\n\nb\n\n\nc\n\n\n\n",
    "returns": "a\r\nb\rc\r\r\n",
    "indented": "a\n    b\n        c\n\td\n \t e",
    "spaces before newline": "a  \n  \n\n   b",
    "other spaces": "a\u00a0b\u2003c\u3000d\u200be\ufefff\u2028g\u2029h\u0085i\u202fj",
    "vertical": "a\x0bb\x0cc",
    "lower block": "▁a ▁ ▁▁ b▁c ▁▁▁▁",
    "long run of spaces": " " * 100 + "a",
    "long run of newlines": "\n" * 70 + "a",
}

CONTROL = {
    "nul": "a\x00b",
    "c0": "".join(map(chr, range(32))),
    "c1": "".join(map(chr, range(127, 161))),
    "bidi": "a\u202eb\u202cc\u2066d\u2069",
    "non-characters": "\ufffe\uffff\U0010ffff\ufffd",
    "private use": "\ue000\uf8ff\U000f0000",
    "variation": "\ufe0f\ufe0e",
}

DIGITS = {
    "years": "In 1984 and 2024, 12345678901234567890 times",
    "spaced": "1 2  3   4    5",
    "decimals": "3.14159 1,234,567.89 1e-9 0xFF 50% $5 #1 -7",
    "scripts": "٠١٢ ०१२ ๐๑๒ ０１２ ⅣⅤ ①② ²³ ½¾",
    "with letters": "a1b22c333d4444 v1.2.3-rc4",
    "dates": "2026-11-23T02:15:00Z 23/11/26",
}

SPECIAL_NAMES = {
    "chat": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "chat with spaces": "a <|im_start|> b<|im_end|>c <|endoftext|>",
    "gemma chat": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "gemma in text": "a <bos> b<eos>c <unused0> <pad><unk><mask> [multimodal]",
    "html tags": "<b>a</b> <i> x </i><h1></h1> < b> <table>  <tr>",
    "bytes": "<0x41> <0x0A><0xFF>",
    "cut off": "<|im_start <|im_end| <|endoftext <bos <end_of_turn",
    "doubled": "<|im_end|><|im_end|> <eos><eos>",
    "code names": "<repo_name>a<filename>b<gh_stars>5",
}

CORPUS = {
    f"{group}: {name}": text
    for group, texts in (
        ("script", SCRIPTS),
        ("code", CODE),
        ("emoji", EMOJI),
        ("space", WHITE_SPACE),
        ("control", CONTROL),
        ("digits", DIGITS),
        ("special", SPECIAL_NAMES),
    )
    for name, text in texts.items()
}
