"""Tokenizer files of a Hugging Face folder: written so that AutoTokenizer gives titanlite's ids, and read back.

Text stays text: the written folder sets split_special_tokens, so that a special token's name in a text is ordinary
characters, as in training. Refuses to read a tokenizer that is no byte-level BPE, or one that changes text first.
"""

import base64
import json
import os
from typing import Any

from titanlite.convert import bpe
from titanlite.tokenizer import Tokenizer

JSON, CONFIG, SPECIAL_MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
NAMES = ("bos_token", "eos_token", "pad_token")
_UNUSED = "<|unused_{}|>"  # tokenizer.json numbers added tokens without gaps


def write_json(folder: str, name: str, content: dict[str, Any]) -> None:
    with open(os.path.join(folder, name), "x", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(folder: str, name: str) -> dict[str, Any]:
    """Raises ValueError where it is not there or no JSON object."""
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return content


def write_tokenizer(folder: str, tokenizer: Tokenizer, max_length: int) -> None:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    special = {token_id: token for token, token_id in tokenizer.special_tokens.items()}
    added = special | {token_id: _UNUSED.format(token_id) for token_id in tokenizer.unused_ids()}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ids = dict(zip(NAMES, (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id), strict=True))
    named = {name: special[token_id] for name, token_id in ids.items() if token_id is not None}
    prefix = named.get("bos_token") if tokenizer.bos_id != tokenizer.eos_id else None
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token_id, "content": added[token_id], **flags} for token_id in sorted(added)],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(tokenizer.split_pattern),
        "post_processor": _begin_with(prefix, tokenizer.bos_id) if prefix else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": _model(tokenizer),
    }
    write_json(folder, JSON, content)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(i): {"content": added[i], **flags} for i in sorted(added)},
        **named,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "split_pattern": tokenizer.split_pattern,
    }
    write_json(folder, CONFIG, config)
    write_json(folder, SPECIAL_MAP, named)


def _pre_tokenizer(pattern: str) -> dict[str, Any]:
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in (bpe.PIECES, bpe.to_oniguruma(pattern))
    ]
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*splits, to_bytes]}


def _begin_with(bos: str, bos_id: int | None) -> dict[str, Any]:
    def one(sequence: str, type_id: int) -> list[dict[str, Any]]:
        begin = {"SpecialToken": {"id": bos, "type_id": type_id}}
        return [begin, {"Sequence": {"id": sequence, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": one("A", 0) + one("B", 1),
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _model(tokenizer: Tokenizer) -> dict[str, Any]:
    ranks = tokenizer.ranks()
    pairs, whole_only = bpe.merges(ranks)
    vocabulary = {bpe.to_string(token): rank for token, rank in ranks.items()}
    if twins := vocabulary.keys() & tokenizer.special_tokens.keys():
        raise ValueError(
            f"tokenizer.json cannot express this tokenizer: {min(twins)!r} is a special token and one of text"
        )
    # Among the ranks (p50k_base has its eos there) a special token must be part of the model's vocabulary.
    inner = {token: i for token, i in tokenizer.special_tokens.items() if i < max(ranks.values())}
    if inner and whole_only:
        raise ValueError(
            f"tokenizer.json cannot express this tokenizer: special token {min(inner)!r} lies among the ranks, and"
            f" {whole_only[0]!r} is a token that no merge gives: text could forge the special token"
        )
    vocabulary |= inner
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": bool(whole_only),
        "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])),
        "merges": [[bpe.to_string(left), bpe.to_string(right)] for left, right in pairs],
    }


def import_tokenizer(source: str, target: str) -> Tokenizer:
    """Write titanlite's tokenizer folder `target` from a Hugging Face folder, and load it.

    Raises ValueError with the reason where it is no tokenizer that titanlite could be.
    """
    content = read_json(source, JSON)
    config = read_json(source, CONFIG) if os.path.exists(os.path.join(source, CONFIG)) else {}
    try:
        ranks, special = _ranks_and_special(content)
        pattern = _pattern(content["pre_tokenizer"], config.get("split_pattern"))
        prefix = _prefix(content.get("post_processor"))
    except ValueError as error:
        raise ValueError(f"{os.path.join(source, JSON)}: {error}") from None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{os.path.join(source, JSON)}: no tokenizer of a known form: {error!r}") from error
    named = {}
    for name in NAMES:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in special:
            named[name] = token
    if named.get("bos_token") not in (prefix, named.get("eos_token")):  # named, but no text begins with it
        del named["bos_token"]
    os.mkdir(target)
    order = sorted(ranks.items(), key=lambda item: item[1])
    with open(os.path.join(target, "tokenizer.model"), "xb") as file:
        file.writelines(base64.b64encode(token) + b" %d\n" % rank for token, rank in order)
    added = {str(i): {"content": token, "special": True} for token, i in special.items()}
    write_json(target, CONFIG, {"split_pattern": pattern, "added_tokens_decoder": added, **named})
    return Tokenizer.load(target)


def _ranks_and_special(content: dict[str, Any]) -> tuple[dict[bytes, int], dict[str, int]]:
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise ValueError(
            f"a {model.get('type')} with byte_fallback = {bool(model.get('byte_fallback'))}, no byte-level BPE"
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"model.{key} = {model[key]!r:.40} is not understood")
    if content.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
        raise ValueError(
            f"its normalizer ({content['normalizer'].get('type')}) changes text, which titanlite never does"
        )
    special = {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
    ranks: dict[bytes, int] = {}
    for string, rank in model["vocab"].items():
        if string not in special:
            token = bpe.to_bytes(string)
            if token is None:
                raise ValueError(f"token {string!r} is not written in the byte-level alphabet")
            ranks[token] = rank
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merges = [(bpe.to_bytes(left), bpe.to_bytes(right)) for left, right in pairs]
    known = [(left, right) for left, right in merges if left is not None and right is not None]
    if len(known) < len(merges):
        raise ValueError("a merge is not written in the byte-level alphabet")
    bpe.check_merges(ranks, known, bool(model.get("ignore_merges")))
    return ranks, {token: i for token, i in special.items() if token != _UNUSED.format(i)}


def _pattern(pre_tokenizer: dict[str, Any], ours: object) -> str:
    """The split pattern, `ours` where that is what the file says in its engine's words."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    steps = [step for step in steps if step.get("pattern") != {"Regex": bpe.PIECES}]
    last = steps[-1]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        raise ValueError("its pre_tokenizer is not understood: the last step must be ByteLevel without a prefix space")
    if len(steps) == 1 and last.get("use_regex", True):
        return bpe.GPT2_PATTERN
    if len(steps) != 2 or last.get("use_regex", True) or steps[0]["type"] != "Split":
        raise ValueError(f"its pre_tokenizer is not understood: {', '.join(step['type'] for step in steps)}")
    if steps[0]["behavior"] != "Isolated" or steps[0].get("invert") or "Regex" not in steps[0]["pattern"]:
        raise ValueError("its pre_tokenizer is not understood: Split must isolate the matches of a Regex")
    theirs: str = steps[0]["pattern"]["Regex"]
    if isinstance(ours, str) and bpe.to_oniguruma(ours) == theirs:
        return ours
    if bpe.to_oniguruma(theirs) != theirs:
        raise ValueError(f"its split pattern means something else to tiktoken's regex engine: {theirs!r}")
    return theirs


def _prefix(processor: dict[str, Any] | None) -> str | None:
    """The special token with which the post-processor lets a text begin."""
    steps = (processor or {}).get("processors", [processor or {}])
    for step in steps:
        if step.get("type") == "TemplateProcessing":
            first = step["single"][0]
            return first["SpecialToken"]["id"] if "SpecialToken" in first else None
    return None
