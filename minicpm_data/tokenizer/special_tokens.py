"""Variants of a ``tokenizer.json``: one without special tokens, and one for the continuation of a text."""

from collections.abc import Set
from typing import Any


def plain_spec(spec: dict[str, Any], markers: Set[str]) -> dict[str, Any]:
    """``spec`` without the tokens ``markers``: they are not added tokens, and no merge produces one."""
    model = spec["model"]
    unreachable = {token: f"\0 {token}" for token in markers}  # no merge produces this
    everything = {**model["vocab"], **{token["content"]: token["id"] for token in spec["added_tokens"]}}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ())]
    model = {
        **model,
        "vocab": {unreachable.get(token, token): i for token, i in everything.items()},
        "unk_token": unreachable.get(model["unk_token"], model["unk_token"]),
        "merges": [pair for pair in pairs if markers.isdisjoint((*pair, "".join(pair)))],
    }
    added = [token for token in spec["added_tokens"] if token["content"] not in markers]
    return {**spec, "model": model, "added_tokens": added, "post_processor": None}


def without_prefix(spec: dict[str, Any]) -> dict[str, Any]:
    """``spec`` without the steps that add a space before a text."""

    def bare(part: dict[str, Any] | None) -> dict[str, Any] | None:
        if part is None or part["type"] == "Prepend":
            return None
        off = {"prepend_scheme": "never", "add_prefix_space": False}
        changed: dict[str, Any] = {key: value for key, value in off.items() if key in part}
        for key in {"normalizers", "pretokenizers"} & part.keys():
            changed[key] = [item for item in map(bare, part[key]) if item is not None]
        return {**part, **changed}

    return {**spec, "normalizer": bare(spec["normalizer"]), "pre_tokenizer": bare(spec["pre_tokenizer"])}
