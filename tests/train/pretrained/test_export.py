"""Tests of export: transformers loads the same model and tokenizer, or nothing is exported."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import gloo_ranks

from train.__main__ import main
from train.config import load as configuration
from train.config import schema
from train.data.prepare.prepare import prepare
from train.errors import UserError
from train.generation.text_streamer import generate_text
from train.pretrained import hf
from train.pretrained.export import export, head_logits
from train.pretrained.hf.family import map_to
from train.run_dir.open_run import load_objective, open_run

FAMILIES = {
    "gpt2": ["model=gpt_tiny", "model.width=32", "model.layers=2"],
    "llama": ["model=llama_tiny", "model.layers=2"],
}
SHORT = ["steps=2", "eval_every=0", "save_every=0"]
SHARD_BYTES = 5_000_000_000


def trained(make, corpus: Path, *overrides: str, name: str = "run") -> Path:
    config = make(*SHORT, *overrides, name=name)
    gloo_ranks.train_world(config, corpus)
    return Path(config.run.dir)


def logits_of(run: Path, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Our logits and those of the model that transformers' auto class loads from ``folder``, for 16 tokens."""
    tokens = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        own = head_logits(open_run(run).objective, tokens)[0]
        return own, transformers.AutoModelForCausalLM.from_pretrained(folder)(tokens).logits[..., :257]


def test_export_of_bert_pretraining_t5_and_t5_1_1_is_verified(make, corpus: Path, tmp_path: Path):
    """The export verifies itself: a wrong one raises UserError."""
    experiment = [
        f"data.paths=[{corpus.parent / 'text'}]",
        f"data.dir={corpus}",
        *gloo_ranks.TEXT,
        "tracking=off",
        *SHORT,
    ]
    untied = ["model.tied=false", "model.activation=geglu"]
    for name, tiny, heads, overrides in (
        ("bert_tiny", "bert_tiny", 2, []),
        ("t5_tiny", "t5_tiny", 1, []),
        ("1_1", "t5_tiny", 1, untied),
    ):
        keys = [
            f"experiment={tiny}",
            *experiment,
            *overrides,
            f"run.dir={tmp_path / name}",
            "batch.seq_len=16",
            "batch.global=4",
        ]
        gloo_ranks.train_world(configuration.load([*keys, "cluster.workers=2"]), corpus)
        done = export(tmp_path / name, tmp_path / f"{name}-there", "latest", SHARD_BYTES)
        assert done.difference <= 1e-5
        assert len(head_logits(open_run(tmp_path / name).objective, torch.zeros(1, 8, dtype=torch.int64))) == heads
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert_tiny-there")
    assert (tokenizer.mask_token, tokenizer.pad_token, tokenizer.cls_token) == ("[MASK]", "[PAD]", "[CLS]")


def test_exported_bert_classifier_equals_ours_and_pooler_is_named(tmp_path: Path):
    """It starts from a BERT trained without sentence pairs, so without a pooler, which is initialised and named."""
    lines: list[dict[str, str]] = []
    for n in range(30):
        lines += [{"text": f"{n} {word}", "label": word} for word in ("joy", "woe", "so so")]
    (tmp_path / "moods.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    same = [
        "experiment=bert_tiny",
        *gloo_ranks.TEXT,
        *SHORT,
        "data.label_key=label",
        "cluster.workers=2",
        f"data.paths=[{tmp_path}/moods.jsonl]",
    ]
    classes = [
        "data.pack=false",
        "objective=classify",
        "objective.classes=[joy,woe,so so]",
        f"init.from={tmp_path}/masked",
    ]
    for name, keys in (
        ("masked", ["objective.next_sentence=false"]),
        ("own", classes),
        ("mean", [*classes, "objective.pool=mean"]),
    ):
        config = configuration.load([*same, *keys, f"data.dir={tmp_path}/corpus", f"run.dir={tmp_path / name}"])
        gloo_ranks.train_world(
            config, prepare(config.data.model_copy(update={"workers": 1}), lambda event: None, config.objective)
        )
    drawn = {name: json.loads((tmp_path / name / "init.json").read_text())["fresh"] for name in ("own", "mean")}
    head = ["head.weight", "head.bias"]
    assert drawn == {"own": ["backbone.pooler.weight", "backbone.pooler.bias", *head], "mean": head}
    export(tmp_path / "own", tmp_path / "there", "latest", SHARD_BYTES)
    exported = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "there").eval()
    assert exported.config.id2label == {0: "joy", 1: "woe", 2: "so so"}
    tokens = torch.randint(0, 257, (3, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        own = head_logits(open_run(tmp_path / "own").objective, tokens)[0]
        assert own.shape == (3, 3)
        assert (exported(tokens).logits - own).abs().max() < 1e-5
    with pytest.raises(UserError, match=r"objective\.pool=mean"):
        export(tmp_path / "mean", tmp_path / "other", "latest", SHARD_BYTES)


@pytest.mark.parametrize(("zero", "workers"), [(0, 1), (0, 2), (1, 2), (2, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_export_from_any_stage_and_world_size_equals_ours(make, corpus: Path, tmp_path: Path, family, zero, workers):
    run = trained(make, corpus, *FAMILIES[family], f"zero={zero}", f"cluster.workers={workers}")
    done = export(run, tmp_path / "there", "latest", SHARD_BYTES)
    assert done.difference <= 1e-5
    own, exported = logits_of(run, tmp_path / "there")
    assert (own - exported).abs().max() < 1e-5
    assert {f.name for f in (tmp_path / "there").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    assert not list(tmp_path.glob(".there*"))


@pytest.mark.parametrize("keys", [["model.tied=true"], ["model.bias=true", "model.kv_heads=1"]])
def test_export_of_llama_tied_or_with_biases_equals_ours(make, corpus: Path, tmp_path: Path, keys: list[str]):
    run = trained(make, corpus, *FAMILIES["llama"], *keys)
    export(run, tmp_path / "there", "latest", SHARD_BYTES)
    own, exported = logits_of(run, tmp_path / "there")
    assert (own - exported).abs().max() < 1e-5


def test_export_over_shard_bytes_is_written_in_shards(make, corpus: Path, tmp_path: Path):
    run = trained(make, corpus, *FAMILIES["llama"])
    done = export(run, tmp_path / "there", "latest", 50_000)
    assert len(done.files) > 3
    index = json.loads((tmp_path / "there/model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == sorted(file.name for file in done.files)
    assert all(
        file.stat().st_size < 60_000 or list(index["weight_map"].values()).count(file.name) == 1 for file in done.files
    )
    own, exported = logits_of(run, tmp_path / "there")
    assert (own - exported).abs().max() < 1e-5


def peak_of_export(runs: list[str], report: Any) -> None:
    """Send the growth of this process's anonymous memory in the second export; the first imports all modules."""

    def anonymous_bytes() -> int:  # without pages of files that are read, which the system can drop
        return 1024 * int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])

    export(Path(runs[0]), Path(f"{runs[0]}-there"), "latest", SHARD_BYTES)
    samples, done = [anonymous_bytes()], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            samples.append(anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    export(Path(runs[1]), Path(f"{runs[1]}-there"), "latest", SHARD_BYTES)
    done.set()
    sampler.join()
    report.send(max(samples) - samples[0])


def test_export_keeps_one_model_in_memory(make, corpus: Path):
    """Loading the optimizer's moments would take two more, our model beside transformers' one more."""
    large = ["model.width=384", "model.heads=8", "model.layers=6", "zero=3", "cluster.workers=2"]
    runs = [
        str(trained(make, corpus, *FAMILIES["gpt2"], name="small")),
        str(trained(make, corpus, *FAMILIES["gpt2"], *large, name="large")),
    ]
    receiver, sender = gloo_ranks.FORKS.Pipe()
    process = gloo_ranks.FORKS.Process(target=peak_of_export, args=(runs, sender))
    process.start()
    peak = receiver.recv()
    process.join()
    shapes = open_run(Path(runs[1])).checkpoint.manifest["shapes"].values()
    model = 4 * sum(math.prod(shape) for shape in shapes)
    assert model > 40_000_000
    assert model < peak < 1.5 * model


@pytest.mark.parametrize("tokenizer", ["bpe", "chars"])
def test_exported_tokenizer_of_any_kind_equals_ours(corpus: Path, tmp_path: Path, tokenizer: str):
    size = "data.tokenizer.vocab_size=300" if tokenizer == "bpe" else "data.tokenizer.vocab_size=null"
    keys = [f"data.paths=[{corpus.parent / 'text'}]", f"data.tokenizer.kind={tokenizer}", size]
    config = gloo_ranks.compose(
        *gloo_ranks.TEXT, *SHORT, *keys, f"data.dir={tmp_path / 'corpus'}", f"run.dir={tmp_path / 'run'}"
    )
    gloo_ranks.train_world(config, prepare(config.data, lambda event: None))
    export(tmp_path / "run", tmp_path / "there", "latest", SHARD_BYTES)
    own, exported = open_run(tmp_path / "run").tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path / "there")
    text = "tea mate  sonata"
    assert exported.encode(text, add_special_tokens=False) == own.encode(text)
    assert exported.decode(own.encode(text)) == text
    assert exported.eos_token_id == own.eot


def test_export_and_import_of_a_run_trains_on_from_its_loss(make, corpus: Path, tmp_path: Path):
    """Its first val_loss equals the last of the exported run; later losses equal those with init.from=<run>."""
    first = make("model=llama_tiny", "zero=3", "cluster.workers=2", "steps=12", name="first")
    gloo_ranks.train_world(first, corpus)
    export(Path(first.run.dir), tmp_path / "there", "latest", 100_000)
    metrics = {}
    for name, origin in (("folder", tmp_path / "there"), ("run", first.run.dir)):
        still = make("model=llama_tiny", f"init.from={origin}", "steps=1", "optimizer.lr=1e-12", name=f"{name}-still")
        gloo_ranks.train_world(still, corpus)
        assert gloo_ranks.metrics(still)[-1]["val_loss"] == pytest.approx(
            gloo_ranks.metrics(first)[-1]["val_loss"], rel=1e-6
        )
        tuned = make("model=llama_tiny", f"init.from={origin}", "steps=8", name=name)
        gloo_ranks.train_world(tuned, corpus)
        metrics[name] = gloo_ranks.metrics(tuned)
    assert metrics["folder"] == metrics["run"]
    assert metrics["folder"][-1]["val_loss"] < gloo_ranks.metrics(first)[-1]["val_loss"]


def test_export_that_differs_from_ours_is_refused(make, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a mistake in the family's table: gate and up exchanged, or a norm written under another name."""
    run, llama = trained(make, corpus, *FAMILIES["llama"]), hf.FAMILIES[1]
    gate_up, norm = "backbone.blocks.#.mlp.gate_up", "backbone.blocks.#.mlp_norm"
    for module, mapping, message in (
        (gate_up, map_to("model.layers.#.mlp.up_proj", "model.layers.#.mlp.gate_proj"), "logits differ from ours by"),
        (
            norm,
            map_to("model.layers.#.other_norm"),
            r"missing keys: model\.layers\.0\.post_attention_layernorm\.weight",
        ),
    ):
        broken = replace(llama, modules=llama.modules | {module: mapping})
        monkeypatch.setattr(hf, "FAMILIES", (broken,))
        with pytest.raises(UserError, match=message):
            export(run, tmp_path / "there", "latest", SHARD_BYTES)
        assert not [file for file in tmp_path.iterdir() if "there" in file.name]


def test_export_to_a_folder_in_use_is_refused_to_an_empty_one_done(make, corpus: Path, tmp_path: Path, capsys):
    run = trained(make, corpus, *FAMILIES["gpt2"])
    (tmp_path / "there").mkdir()
    command = ["export", f"run.dir={run}", f"to={tmp_path / 'there'}"]
    assert main(command) == 0
    assert "transformers" in capsys.readouterr().out
    before = sorted(file.name for file in (tmp_path / "there").iterdir())
    assert main(command) == 2
    assert "is not empty" in capsys.readouterr().err
    assert sorted(file.name for file in (tmp_path / "there").iterdir()) == before
    assert main(["export", f"run.dir={run}", f"to={tmp_path / 'other'}", "checkpoint=7"]) == 2
    assert "It has the steps 2" in capsys.readouterr().err
    assert main(["export", f"run.dir={run}", f"to={tmp_path / 'other'}", "shard_mb=none"]) == 2


def test_export_of_an_unknown_model_is_refused_naming_its_keys(make, corpus: Path, tmp_path: Path):
    run = trained(make, corpus, "model.activation=swiglu")
    with pytest.raises(UserError, match=r"model\.activation=gelu \(not swiglu\)"):
        export(run, tmp_path / "there", "latest", SHARD_BYTES)
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_users_default_call_writes_the_text_that_ours_does(make, corpus: Path, tmp_path: Path, family: str):
    """The tokenizer begins a text as training did; rows of the embedding without a token are never written."""
    run = trained(make, corpus, *FAMILIES[family])
    export(run, tmp_path / "there", "latest", SHARD_BYTES)
    saved, tokenizer = open_run(run), transformers.AutoTokenizer.from_pretrained(tmp_path / "there")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "there")
    prompts = ["tea", "a sonata"]
    assert tokenizer(prompts[0])["input_ids"] == [saved.tokenizer.eot, *saved.tokenizer.encode(prompts[0])]
    options = schema.GenerationConfig(max_tokens=8, temperature=0.0)
    ours = [texts[0].text for texts in generate_text(saved.objective, saved.tokenizer, prompts, options)]
    for prompt, text in zip(prompts, ours, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(made, skip_special_tokens=True) == text
    together = model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=8)[:, -8:]
    assert tokenizer.batch_decode(together, skip_special_tokens=True) == ours


class NotANumber:
    """Reads every parameter as numbers that are none."""

    def read(self, name: str, kind: str, start: int, count: int) -> torch.Tensor:
        return torch.full((count,), torch.nan)


def test_checkpoint_that_is_not_finite_is_refused_wherever_it_is_read(make, corpus: Path):
    saved = open_run(trained(make, corpus, *FAMILIES["gpt2"]))
    with pytest.raises(UserError, match=r"step_0*2 holds numbers that are not finite, in backbone\.embed\.weight"):
        load_objective(replace(saved, reader=NotANumber()))
