"""Hugging Face's form of our models: a table a family, folders of it written and read. None of it imports transformers."""

from __future__ import annotations

from typing import Any

from train.errors import UserError
from train.pretrained.hf import bert, gpt2, llama, t5
from train.pretrained.hf.family import Facts, HFFamily

FAMILIES = (gpt2.FAMILY, llama.FAMILY, bert.FAMILY, t5.FAMILY)


def family_of(objective: str, facts: Facts) -> HFFamily:
    """The family that has all of a model's ``facts``; raises UserError naming the keys that keep it from each."""
    kept = [(family, family.lacking(objective, facts)) for family in FAMILIES]
    for family, problems in kept:
        if not problems:
            return family
    kept = [way for way in kept if way[0].needs["family"] == facts["family"]]
    if not kept:
        raise UserError(
            f"transformers has no model of family {facts['family']}; it has {', '.join(f.name for f in FAMILIES)}"
        )
    ways = "\n".join(f"  - as {family.name} it would need {', '.join(problems)}" for family, problems in kept)
    raise UserError(f"transformers has no model of this kind:\n{ways}")


def family_named(config: dict[str, Any], where: str) -> HFFamily:
    """The family of a folder's ``config.json``, which lies at ``where``."""
    for family in FAMILIES:
        if config.get("model_type") == family.model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(f"{where} is of model_type {config.get('model_type')!r}; read are: {known}")
