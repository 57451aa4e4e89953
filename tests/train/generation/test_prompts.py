"""Prompts of samples: a default that does not fit is left out, a given one refused by its key."""

from __future__ import annotations

import pytest

from train.config import schema
from train.config.keys.data import TokenizerConfig
from train.data.tokenizer import Tokenizer, build_tokenizer
from train.errors import UserError
from train.generation.prompts import check_given, with_prompts

CHINESE = Tokenizer(build_tokenizer(TokenizerConfig(kind="chars"), [], "床前明月光"))


def config_of(make_config, source: str, prompts: list[str] | None, **keys):
    config = make_config(**keys)
    data = config.data.model_copy(update={"source": source})
    return config.model_copy(update={"data": data, "generation": schema.GenerationConfig(prompts=prompts)})


def test_default_prompts_are_the_corpuss_and_what_does_not_fit_is_noted(make_config):
    notes: list[str] = []
    assert with_prompts(config_of(make_config, "text", None), CHINESE, notes.append).generation.prompts == [""]
    assert notes == []
    assert with_prompts(config_of(make_config, "stdlib", None), CHINESE, notes.append).generation.prompts == []
    assert len(notes) == 2
    assert "'def'" in notes[0]


def test_given_prompt_that_does_not_fit_is_refused_by_its_key(make_config):
    with pytest.raises(UserError, match=r"generation\.prompts: prompt 'def '.*characters"):
        check_given(config_of(make_config, "text", ["床", "def "]), CHINESE)
    with pytest.raises(UserError, match=r"generation\.prompts: prompt 0 has 5 tokens"):
        check_given(config_of(make_config, "text", ["床前明月"], seq_len=4, max_len=4), CHINESE)
    check_given(config_of(make_config, "text", ["def "], model="bert_tiny"), CHINESE)  # it writes no text
