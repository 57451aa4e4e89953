"""Our models in the Hugging Face format, read and written without importing transformers.

family   the table that maps one model family: config keys, weight names, requirements
gpt2     table of GPT-2
llama    table of Llama
bert     table of BERT
t5       table of T5
folder   safetensors and tokenizer of a Hugging Face folder, read and written one tensor at a time
listing  config.json and the headers of the weight files, without loading weights
"""

from __future__ import annotations

from typing import Any

from train.errors import UserError
from train.pretrained.hf import bert, gpt2, llama, t5
from train.pretrained.hf.family import ArchKeys, HFFamily

FAMILIES = (gpt2.FAMILY, llama.FAMILY, bert.FAMILY, t5.FAMILY)


def find_family(objective: str, arch: ArchKeys) -> HFFamily:
    """The family that a model of ours belongs to. Raises UserError with the requirements it does not meet in each."""
    unmet = {family.name: family.unmet_requirements(objective, arch) for family in FAMILIES}
    for family in FAMILIES:
        if not unmet[family.name]:
            return family
    similar = [family.name for family in FAMILIES if family.required["family"] == arch["family"]]
    if not similar:
        known = ", ".join(family.name for family in FAMILIES)
        raise UserError(f"transformers has no model of family {arch['family']}; it has {known}")
    listed = "\n".join(f"  - as {name} it would need {', '.join(unmet[name])}" for name in similar)
    raise UserError(f"transformers has no model of this kind:\n{listed}")


def family_of_config(config: dict[str, Any], path: str) -> HFFamily:
    """The family that a ``config.json`` names; ``path`` is that file's, for the UserError of an unknown family."""
    for family in FAMILIES:
        if config.get("model_type") == family.model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    kind = repr(config.get("model_type"))[:80]
    raise UserError(f"{path} is of model_type {kind}, which is not read; those that are: {known}")
